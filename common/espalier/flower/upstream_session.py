"""A node's session with one upstream server: registration, heartbeats, polling, and the app calls it asks for."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from espalier.errors import StateError
from espalier.flower.backoff import Backoff, PollPace
from espalier.flower.fleet_client import FleetClient, Pulled
from espalier.flower.heartbeat import Heartbeat
from espalier.flower.memory import CycleCollector, trim_heap
from espalier.flower.node_resources import NodeResources
from espalier.flower.node_state import ContextStates, NodeIds
from espalier.flower.payloads import Packed, PayloadError, array_bytes, pack
from espalier.flower.run_info import RUN_RECORD, RunInfo, UserConfig, parse_run_record
from espalier.flower.upstreams import (
    KeyRefusedError,
    MessageDiscardedError,
    NodeUnknownError,
    Upstream,
    UpstreamError,
    UpstreamUnavailableError,
    UpstreamUntrustedError,
)

BACKOFF_CAP = 10.0
WORKER_IDLE_TIME = 15.0  # seconds for which an idle worker thread waits for the next message before it exits
BUSY_POLL_INTERVAL = 0.5  # seconds between polls of a server that does not hold polls, while the app runs

T = TypeVar("T")
App = Callable[[Message, Context], Message]


@dataclass
class SharedNodeState:
    """State that the sessions of one node share."""

    app: App
    node_config: UserConfig
    side_types: frozenset[str]
    key: ec.EllipticCurvePrivateKey
    ids: NodeIds
    contexts: ContextStates
    resources: NodeResources
    on_event: Callable[[str, dict[str, Any]], None]
    stopped: threading.Event = field(default_factory=threading.Event)
    app_lock: threading.Lock = field(default_factory=threading.Lock)  # the app runs one call at a time
    app_lock_released: threading.Condition = field(default_factory=threading.Condition)
    connection_changed: threading.Condition = field(default_factory=threading.Condition)

    def wake(self) -> None:
        """Wake every thread that waits on one of the conditions."""
        for condition in (self.app_lock_released, self.connection_changed):
            with condition:
                condition.notify_all()


class UpstreamSession:
    """The connection of a node to one upstream server.

    One thread polls; a worker thread exists while there are messages to process; heartbeats are sent by the scheduler
    that all sessions share.

    Parameters
    ----------
    shared : SharedNodeState
        Shared with the sessions of the node's other upstreams.
    upstream : Upstream
        The server to connect to.
    """

    def __init__(self, shared: SharedNodeState, upstream: Upstream) -> None:
        self.shared = shared
        self.upstream = upstream
        self.client = FleetClient(upstream, shared.key, shared.stopped, shared.resources.channels)
        self.runs = RunInfo(self.client)
        self.connected = False
        self._outage_reported = False
        self._refusal = ""
        self._heartbeat = Heartbeat(self.client, shared.resources.heartbeats, shared.stopped)
        self._queue: deque[tuple[int, Message]] = deque()
        self._busy = False
        self._serving = False
        self._work = threading.Condition()
        self._session = 0
        self._collector = CycleCollector()
        self._poller = threading.Thread(
            target=self._run_forever, args=(self._poll,), name=f"poll {upstream.address}", daemon=True
        )

    def start(self) -> None:
        """Start polling and sending heartbeats."""
        self._poller.start()
        self._heartbeat.start()

    def _run_forever(self, target: Callable[[], None]) -> None:
        """Restart the worker after an unexpected exception, so that a node never hangs silently."""
        while not self.shared.stopped.is_set():
            try:
                target()
            except Exception:
                logging.getLogger(__name__).exception(
                    "%s: unexpected error; continuing", self.upstream.address
                )
                self.shared.stopped.wait(1.0)

    def close(self, patience: float) -> None:
        """Deactivate the node and end the threads; wait up to `patience` seconds for a running app call."""
        self.client.close()
        with self._work:
            self._work.notify_all()
        end = time.monotonic() + patience
        if self._poller.ident is not None:
            self._poller.join(max(0.0, patience))
        with self._work:
            self._work.wait_for(lambda: not self._serving, max(0.0, end - time.monotonic()))

    def _emit(self, kind: str, **facts: Any) -> None:
        self.shared.on_event(kind, {"upstream": self.upstream.address, **facts})

    def _set_connected(self, connected: bool, reason: str = "") -> None:
        if self.connected == connected:
            return
        with self.shared.connection_changed:
            self.connected = connected
            self.shared.connection_changed.notify_all()
        if connected:
            self._outage_reported, self._refusal = False, ""
            self._emit("connected", node_id=self.client.node_id)
        elif not self.shared.stopped.is_set():
            self._emit("disconnected", reason=reason)

    # Polling ------------------------------------------------------------------------------------

    def _poll(self) -> None:
        backoff = Backoff(cap=BACKOFF_CAP)
        pace = PollPace()
        joined = False
        stopped = self.shared.stopped
        while not stopped.is_set():
            try:
                if self._heartbeat.forgotten.is_set() or not joined:
                    joined = False
                    self._join()
                    joined = True
                    pace.activity()
                if not self._may_pull(pace):
                    continue
                began = time.monotonic()
                pulled = self.client.pull()
                self._set_connected(True)
                backoff.reset()
                if pulled is None:
                    self._rest(pace, time.monotonic() - began)
                    continue
                self._receive(pulled)
                pace.activity()
            except NodeUnknownError as fault:
                joined = False
                self._set_connected(False, str(fault))
                stopped.wait(backoff.next())
            except UpstreamUnavailableError as fault:
                if not self.connected and not self._outage_reported:  # report each outage once
                    self._outage_reported = True
                    untrusted = isinstance(fault, UpstreamUntrustedError)
                    self._emit("unreachable", reason=str(fault), untrusted=untrusted)
                self._set_connected(False, str(fault))
                stopped.wait(backoff.next())
            except (UpstreamError, StateError) as fault:
                if not joined:
                    self._set_connected(False, str(fault))
                if str(fault) != self._refusal:  # report each reason once, not on every retry
                    self._refusal = str(fault)
                    self._emit("refused", reason=self._refusal, by_key=isinstance(fault, KeyRefusedError))
                stopped.wait(backoff.next())

    def _join(self) -> None:
        node_id = self.client.join(self.shared.ids.get(self.upstream.address))
        self._session += 1
        self._heartbeat.forgotten.clear()
        self.shared.ids.set(self.upstream.address, node_id)
        self._set_connected(True)

    def _may_pull(self, pace: PollPace) -> bool:
        """Return whether to poll now; without side types there is no need to while the app runs."""
        if self.shared.side_types:
            return True
        with self.shared.app_lock_released:
            if self._occupied():
                self.shared.app_lock_released.wait(1.0)
                pace.activity()
                return False
        return True

    def _occupied(self) -> bool:
        return self._busy or self.shared.app_lock.locked()

    def _rest(self, pace: PollPace, took: float) -> None:
        """Wait until the next poll; while the app runs only small, uncritical messages are expected."""
        wait, stopped = pace.after(took), self.shared.stopped
        if not wait or not self._occupied():
            stopped.wait(wait)
            return
        with self.shared.app_lock_released:
            free = self.shared.app_lock_released.wait_for(
                lambda: not self._occupied() or stopped.is_set(), BUSY_POLL_INTERVAL
            )
        if free:
            pace.activity()

    def _receive(self, pulled: Pulled) -> None:
        metadata = pulled.message.metadata
        kind = metadata.message_type
        try:
            message = self.client.fetch(pulled, metadata.created_at + metadata.ttl)
        except (MessageDiscardedError, PayloadError) as fault:
            self._emit("dropped", message_type=kind, reason=str(fault))
            return
        self._emit(
            "message",
            message_type=kind,
            run_id=metadata.run_id,
            group_id=metadata.group_id,
            bytes=array_bytes(message),
        )
        if kind in self.shared.side_types:
            self._answer(message, self._session, side=True)
            return
        with self._work:
            self._busy = True
            self._queue.append((self._session, message))
            self._work.notify_all()
            if not self._serving:
                self._serving = True
                threading.Thread(
                    target=self._serve, name=f"work {self.upstream.address}", daemon=True
                ).start()

    # Serving ------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Process the queue; exit after `WORKER_IDLE_TIME` without work, as an idle thread still costs memory."""
        shared = self.shared
        while True:
            with self._work:
                self._busy = bool(self._queue)
                if not self._busy:
                    with shared.app_lock_released:
                        shared.app_lock_released.notify_all()
                    self._work.wait_for(lambda: self._queue or shared.stopped.is_set(), WORKER_IDLE_TIME)
                if shared.stopped.is_set() or not self._queue:
                    self._serving = False
                    self._work.notify_all()
                    break
                session, message = self._queue.popleft()
            self._collector.track(message)
            try:
                self._answer(message, session, side=False)
            except Exception:
                logging.getLogger(__name__).exception(
                    "%s: unexpected error; continuing", self.upstream.address
                )
            del message
            self._collector.collect()
        trim_heap()  # return the memory of the work to other processes on this machine

    def _answer(self, message: Message, session: int, *, side: bool) -> None:
        """Call the app and push its reply, unless the message has expired."""
        metadata = message.metadata
        give_up_at = metadata.created_at + metadata.ttl

        def expired() -> bool:
            return session != self._session or self.shared.stopped.is_set() or time.time() > give_up_at

        try:
            run_key, config = self._retry(lambda: self._run_of(message), expired)
            began = time.monotonic()
            if side:
                reply, packed = self._call_app(message, run_key, config, side=True)
            else:
                with self.shared.app_lock, self.shared.resources.app_turn(metadata.message_type):
                    if expired():
                        raise MessageDiscardedError("the message has expired")
                    began = time.monotonic()
                    reply, packed = self._call_app(message, run_key, config, side=False)
                with self.shared.app_lock_released:
                    self.shared.app_lock_released.notify_all()
            runtime = time.monotonic() - began
            wanted = self._retry(lambda: self.client.push(reply, packed, runtime, give_up_at), expired)
        except UpstreamError as fault:
            self._emit("dropped", message_type=metadata.message_type, reason=str(fault))
            return
        self._emit(
            "reply",
            message_type=metadata.message_type,
            seconds=runtime,
            wanted=wanted,
            bytes=array_bytes(reply),
        )

    def _retry(self, call: Callable[[], T], expired: Callable[[], bool]) -> T:
        """Repeat a call while the server is unavailable, until the message has expired."""
        backoff = Backoff(cap=BACKOFF_CAP)
        while True:
            try:
                return call()
            except UpstreamUnavailableError:
                self.shared.stopped.wait(backoff.next())
                if expired():
                    raise

    def _call_app(
        self, message: Message, run_key: str, config: UserConfig | ValueError, *, side: bool
    ) -> tuple[Message, Packed]:
        """Call the app; an exception that it raises becomes an Error reply."""
        try:
            if isinstance(config, ValueError):
                raise config
            context = Context(
                run_id=message.metadata.run_id,
                node_id=self.client.node_id,
                node_config=dict(self.shared.node_config),
                state=self.shared.contexts.load(run_key),
                run_config=config,
            )
            reply = self.shared.app(message, context)
            if not isinstance(reply, Message):
                raise TypeError(f"the app returned a {type(reply).__name__}, not a Message")
            if not side:
                self.shared.contexts.save(run_key, context.state)
            return reply, pack(reply)
        except Exception as fault:  # noqa: BLE001 - a user's code may raise anything; the reply carries it
            reason = f"{type(fault).__name__}: {' '.join(str(fault).split())}"[:500]
            self._emit("error", message_type=message.metadata.message_type, reason=reason)
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
            return reply, pack(reply)

    def _run_of(self, message: Message) -> tuple[str, UserConfig | ValueError]:
        """Return the key of the run's state and its configuration; remove the reserved record from the message."""
        if message.has_content() and isinstance(record := message.content.get(RUN_RECORD), ConfigRecord):
            message.content = RecordDict(
                {key: value for key, value in message.content.items() if key != RUN_RECORD}
            )
            try:
                return parse_run_record(record)
            except ValueError as fault:
                return "", fault
        run_id = message.metadata.run_id
        return f"flwr-{run_id}", self.runs.get(run_id)[1]
