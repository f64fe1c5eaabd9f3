"""What goes on between a node and one of its homes: joining, heartbeats, polls, and the calls of its messages."""

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
from espalier.flower.memory import Sweeper, give_back_freed
from espalier.flower.node_resources import Crew
from espalier.flower.node_state import ContextStates, HomeIds
from espalier.flower.payloads import Packed, PayloadError, array_bytes, pack
from espalier.flower.run_info import RUN_RECORD, RunInfo, UserConfig, parse_run_record
from espalier.flower.upstreams import (
    Home,
    HomeFault,
    HomeUnavailable,
    HomeUntrusted,
    KeyRefused,
    MessageGone,
    NodeForgotten,
)

BACKOFF_CAP = 10.0
LINGER = 15.0  # seconds that a working thread waits for the next message
BESIDE = 0.5  # seconds between two polls of a home that answers at once, while the app works

T = TypeVar("T")
App = Callable[[Message, Context], Message]


@dataclass
class Desk:
    """What the loops of a node's homes share."""

    app: App
    node_config: UserConfig
    side_types: frozenset[str]
    key: ec.EllipticCurvePrivateKey
    ids: HomeIds
    contexts: ContextStates
    crew: Crew
    tell: Callable[[str, dict[str, Any]], None]
    stopped: threading.Event = field(default_factory=threading.Event)
    lane: threading.Lock = field(default_factory=threading.Lock)  # one call at a time
    lane_free: threading.Condition = field(default_factory=threading.Condition)
    connection_changed: threading.Condition = field(default_factory=threading.Condition)

    def wake(self) -> None:
        """Wake everybody who waits for something to change."""
        for condition in (self.lane_free, self.connection_changed):
            with condition:
                condition.notify_all()


class HomeLoop:
    """One home: a thread that polls, one that works while there is work, and heartbeats.

    Parameters
    ----------
    desk : Desk
        Shared with the loops of the other homes.
    home : Home
        The server.
    """

    def __init__(self, desk: Desk, home: Home) -> None:
        self.desk = desk
        self.home = home
        self.client = FleetClient(home, desk.key, desk.stopped, desk.crew.channels)
        self.runs = RunInfo(self.client)
        self.connected = False
        self._told = False
        self._refusal = ""
        self._heartbeat = Heartbeat(self.client, desk.crew.pulse, desk.stopped)
        self._queue: deque[tuple[int, Message]] = deque()
        self._busy = False
        self._serving = False
        self._work = threading.Condition()
        self._session = 0
        self._sweeper = Sweeper()
        self._poller = threading.Thread(
            target=self._guard, args=(self._poll,), name=f"poll {home.address}", daemon=True
        )

    def start(self) -> None:
        """Start polling, and the heartbeats."""
        self._poller.start()
        self._heartbeat.start()

    def _guard(self, target: Callable[[], None]) -> None:
        """Start a thread's work again after a fault that nobody foresaw: a node that only seems alive is worst."""
        while not self.desk.stopped.is_set():
            try:
                target()
            except Exception:
                logging.getLogger(__name__).exception("%s: unforeseen fault; going on", self.home.address)
                self.desk.stopped.wait(1.0)

    def close(self, patience: float) -> None:
        """Leave the home and end the threads; a call of the app is waited for `patience` seconds."""
        self.client.close()
        with self._work:
            self._work.notify_all()
        end = time.monotonic() + patience
        if self._poller.ident is not None:
            self._poller.join(max(0.0, patience))
        with self._work:
            self._work.wait_for(lambda: not self._serving, max(0.0, end - time.monotonic()))

    def _tell(self, kind: str, **facts: Any) -> None:
        self.desk.tell(kind, {"home": self.home.address, **facts})

    def _set_connected(self, connected: bool, reason: str = "") -> None:
        if self.connected == connected:
            return
        with self.desk.connection_changed:
            self.connected = connected
            self.desk.connection_changed.notify_all()
        if connected:
            self._told, self._refusal = False, ""
            self._tell("connected", node_id=self.client.node_id)
        elif not self.desk.stopped.is_set():
            self._tell("disconnected", reason=reason)

    # Polling ------------------------------------------------------------------------------------

    def _poll(self) -> None:
        backoff = Backoff(cap=BACKOFF_CAP)
        pace = PollPace()
        joined = False
        stopped = self.desk.stopped
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
            except NodeForgotten as fault:
                joined = False
                self._set_connected(False, str(fault))
                stopped.wait(backoff.next())
            except HomeUnavailable as fault:
                if not self.connected and not self._told:  # once an outage, however long
                    self._told = True
                    untrusted = isinstance(fault, HomeUntrusted)
                    self._tell("unreachable", reason=str(fault), untrusted=untrusted)
                self._set_connected(False, str(fault))
                stopped.wait(backoff.next())
            except (HomeFault, StateError) as fault:
                if not joined:
                    self._set_connected(False, str(fault))
                if str(fault) != self._refusal:  # once, however often it is tried again
                    self._refusal = str(fault)
                    self._tell("refused", reason=self._refusal, by_key=isinstance(fault, KeyRefused))
                stopped.wait(backoff.next())

    def _join(self) -> None:
        node_id = self.client.join(self.desk.ids.get(self.home.address))
        self._session += 1
        self._heartbeat.forgotten.clear()
        self.desk.ids.set(self.home.address, node_id)
        self._set_connected(True)

    def _may_pull(self, pace: PollPace) -> bool:
        """Wait a little while the lane is busy; with side types there may be a message to serve beside it."""
        if self.desk.side_types:
            return True
        with self.desk.lane_free:
            if self._occupied():
                self.desk.lane_free.wait(1.0)
                pace.activity()
                return False
        return True

    def _occupied(self) -> bool:
        return self._busy or self.desk.lane.locked()

    def _rest(self, pace: PollPace, took: float) -> None:
        """Wait until the next poll: beside a call of the app only small messages come, and they have time."""
        wait, stopped = pace.after(took), self.desk.stopped
        if not wait or not self._occupied():
            stopped.wait(wait)
            return
        with self.desk.lane_free:
            free = self.desk.lane_free.wait_for(lambda: not self._occupied() or stopped.is_set(), BESIDE)
        if free:
            pace.activity()

    def _receive(self, pulled: Pulled) -> None:
        metadata = pulled.message.metadata
        kind = metadata.message_type
        try:
            message = self.client.fetch(pulled, metadata.created_at + metadata.ttl)
        except (MessageGone, PayloadError) as fault:
            self._tell("dropped", message_type=kind, reason=str(fault))
            return
        self._tell(
            "message",
            message_type=kind,
            run_id=metadata.run_id,
            group_id=metadata.group_id,
            bytes=array_bytes(message),
        )
        if kind in self.desk.side_types:
            self._answer(message, self._session, side=True)
            return
        with self._work:
            self._busy = True
            self._queue.append((self._session, message))
            self._work.notify_all()
            if not self._serving:
                self._serving = True
                threading.Thread(target=self._serve, name=f"work {self.home.address}", daemon=True).start()

    # Serving ------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Work off the queue, and stay a while for what comes next: threads cost an idle node memory."""
        desk = self.desk
        while True:
            with self._work:
                self._busy = bool(self._queue)
                if not self._busy:
                    with desk.lane_free:
                        desk.lane_free.notify_all()
                    self._work.wait_for(lambda: self._queue or desk.stopped.is_set(), LINGER)
                if desk.stopped.is_set() or not self._queue:
                    self._serving = False
                    self._work.notify_all()
                    break
                session, message = self._queue.popleft()
            self._sweeper.expect(message)
            try:
                self._answer(message, session, side=False)
            except Exception:
                logging.getLogger(__name__).exception("%s: unforeseen fault; going on", self.home.address)
            del message
            self._sweeper.sweep()
        give_back_freed()  # what the work took, for whoever else is on this machine

    def _answer(self, message: Message, session: int, *, side: bool) -> None:
        """Call the app and send its reply, unless nobody waits for it any more."""
        metadata = message.metadata
        give_up_at = metadata.created_at + metadata.ttl

        def moot() -> bool:
            return session != self._session or self.desk.stopped.is_set() or time.time() > give_up_at

        try:
            run_key, config = self._patiently(lambda: self._run_of(message), moot)
            began = time.monotonic()
            if side:
                reply, packed = self._call_app(message, run_key, config, side=True)
            else:
                with self.desk.lane, self.desk.crew.turn(metadata.message_type):
                    if moot():
                        raise MessageGone("nobody waits for it any more")
                    began = time.monotonic()
                    reply, packed = self._call_app(message, run_key, config, side=False)
                with self.desk.lane_free:
                    self.desk.lane_free.notify_all()
            runtime = time.monotonic() - began
            wanted = self._patiently(lambda: self.client.push(reply, packed, runtime, give_up_at), moot)
        except HomeFault as fault:
            self._tell("dropped", message_type=metadata.message_type, reason=str(fault))
            return
        self._tell(
            "reply",
            message_type=metadata.message_type,
            seconds=runtime,
            wanted=wanted,
            bytes=array_bytes(reply),
        )

    def _patiently(self, call: Callable[[], T], moot: Callable[[], bool]) -> T:
        """Repeat a call while the home is unavailable, until it is moot."""
        backoff = Backoff(cap=BACKOFF_CAP)
        while True:
            try:
                return call()
            except HomeUnavailable:
                self.desk.stopped.wait(backoff.next())
                if moot():
                    raise

    def _call_app(
        self, message: Message, run_key: str, config: UserConfig | ValueError, *, side: bool
    ) -> tuple[Message, Packed]:
        """Call the app; whatever it raises becomes an Error reply, and the node lives on."""
        try:
            if isinstance(config, ValueError):
                raise config
            context = Context(
                run_id=message.metadata.run_id,
                node_id=self.client.node_id,
                node_config=dict(self.desk.node_config),
                state=self.desk.contexts.load(run_key),
                run_config=config,
            )
            reply = self.desk.app(message, context)
            if not isinstance(reply, Message):
                raise TypeError(f"the app returned a {type(reply).__name__}, not a Message")
            if not side:
                self.desk.contexts.save(run_key, context.state)
            return reply, pack(reply)
        except Exception as fault:  # noqa: BLE001 - a user's code may raise anything; the server is told
            reason = f"{type(fault).__name__}: {' '.join(str(fault).split())}"[:500]
            self._tell("error", message_type=message.metadata.message_type, reason=reason)
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
            return reply, pack(reply)

    def _run_of(self, message: Message) -> tuple[str, UserConfig | ValueError]:
        """Return the key of the run's state, and the run's configuration; strip the reserved record."""
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
