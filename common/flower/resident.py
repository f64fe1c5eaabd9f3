"""The resident node: one process that serves the messages of its homes with one app, called in place."""

from __future__ import annotations

import random
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.config import get_fused_config_from_fab
from flwr.common.constant import ErrorCode
from flwr.supercore.fab import Fab

from common.errors import StateError
from common.flower.backoff import Backoff, PollPace
from common.flower.fleet_client import (
    FleetClient,
    Home,
    HomeFault,
    HomeUnavailable,
    MessageGone,
    NodeForgotten,
    Pulled,
    parse_run_record,
)
from common.flower.node_state import ContextStates, HomeIds, StateLock, load_key, load_or_make_key
from common.flower.payloads import PayloadError, pack

__all__ = ["RUN_RECORD", "Fab", "Home", "ResidentNode"]

RUN_RECORD = "espalier.run"
HEARTBEAT_EVERY = 8.0  # the lease is 20 s: leaves room for a lost one and its repetition
BACKOFF_CAP = 10.0
RUNS_CACHED = 8

App = Callable[[Message, Context], Message]
UserConfig = dict[str, bool | int | float | str]


class ResidentNode:
    """A Flower node that stays: it keeps one process, many homes, and the state of its runs.

    Parameters
    ----------
    app : callable
        A Flower ClientApp or any ``(Message, Context) -> Message``. Called in this process, one call at a
        time over all homes; calls for `side_types` may overlap with one other call.
    homes : sequence of Home
        The servers to connect to.
    state : Path
        Folder for the node key, node ids and run states; held by one process at a time.
    node_config : mapping
        Given to the app as ``context.node_config``.
    key : Path, optional
        Private EC key (PEM or OpenSSH); by default ``state/node.key``, made on the first start.
    side_types : frozenset of str
        Message types that are served while a long call runs, e.g. ``{"query.progress"}``.
    on_event : callable, optional
        Called with a kind (connected, disconnected, refused, message, reply, dropped, error) and its facts.

    Raises
    ------
    StateError
        If another process holds `state`, or the key or folder cannot be used.
    """

    def __init__(
        self,
        app: App,
        homes: Sequence[Home],
        state: Path,
        *,
        node_config: Mapping[str, bool | int | float | str],
        key: Path | None = None,
        side_types: frozenset[str] = frozenset(),
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> None:
        if not homes:
            raise ValueError("a node needs at least one home")
        self.app = app
        self.node_config: UserConfig = dict(node_config)
        self.side_types = side_types
        self.stopped = threading.Event()
        self._on_event = on_event
        self._lock_file = StateLock(state)
        try:
            self.key = load_key(key) if key else load_or_make_key(state / "node.key")
            self.ids = HomeIds(state / "homes.json")
            self.contexts = ContextStates(state / "runs")
        except StateError:
            self._lock_file.release()
            raise
        self.lane = threading.Lock()
        self.lane_free = threading.Condition()
        self.connection_changed = threading.Condition()
        self._homes = {home.address: _HomeLoop(self, home) for home in homes}

    def run(self) -> None:
        """Serve until :meth:`stop`; the failure of one home never ends it."""
        try:
            for loop in self._homes.values():
                loop.start()
            self.stopped.wait()
        finally:
            self.stopped.set()
            with self.lane_free:
                self.lane_free.notify_all()
            for loop in self._homes.values():
                loop.join(5.0)
            self._lock_file.release()

    def stop(self) -> None:
        """Make :meth:`run` return. A call under way is not waited for beyond a few seconds."""
        self.stopped.set()
        with self.lane_free:
            self.lane_free.notify_all()
        with self.connection_changed:
            self.connection_changed.notify_all()

    def wait_connected(self, timeout: float, homes: int | None = None) -> bool:
        """Wait until `homes` homes (default: all) are connected, at most `timeout` seconds; return whether they are."""
        wanted = len(self._homes) if homes is None else homes

        def enough() -> bool:
            return sum(loop.connected for loop in self._homes.values()) >= wanted

        with self.connection_changed:
            self.connection_changed.wait_for(lambda: enough() or self.stopped.is_set(), timeout)
            return enough()

    def fetch_fab(self, home: Home, run_id: int) -> Fab | None:
        """Fetch the bundle of a run's app from a home; None if the run has none."""
        return self._homes[home.address].runs.get(run_id)[0]

    def run_config(self, home: Home, run_id: int) -> UserConfig:
        """Return a run's configuration: the app's defaults with the run's overrides."""
        return self._homes[home.address].runs.get(run_id)[1]

    def event(self, kind: str, home: Home, **facts: Any) -> None:
        """Tell the owner."""
        if self._on_event is not None:
            self._on_event(kind, {"home": home.address, **facts})


class _Runs:
    """What a home says about its runs: bundle and configuration, asked once a run."""

    def __init__(self, loop: _HomeLoop) -> None:
        self._loop = loop
        self._held: OrderedDict[int, tuple[Fab | None, UserConfig]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, run_id: int) -> tuple[Fab | None, UserConfig]:
        with self._lock:
            if run_id not in self._held:
                client = self._loop.client
                run = client.get_run(run_id)
                fab = client.get_fab(run_id, run.fab_hash) if run.fab_hash else None
                config = get_fused_config_from_fab(fab.content, run) if fab else dict(run.override_config)
                self._held[run_id] = (fab, config)
            while len(self._held) > RUNS_CACHED:
                self._held.popitem(last=False)
            return self._held[run_id]


class _HomeLoop:
    """Everything that goes on with one home: heartbeat, polls, and the calls of its messages."""

    def __init__(self, node: ResidentNode, home: Home) -> None:
        self.node = node
        self.home = home
        self.client = FleetClient(home, node.key, node.stopped)
        self.runs = _Runs(self)
        self.connected = False
        self._lost = threading.Event()  # the session is over: join again
        self._queue: deque[tuple[int, Message]] = deque()
        self._busy = False
        self._work = threading.Condition()
        self._session = 0
        self._threads = [
            threading.Thread(target=target, name=f"{name} {home.address}", daemon=True)
            for name, target in (("poll", self._poll), ("beat", self._beat), ("work", self._serve))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        with self._work:
            self._work.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, min(2.0, end - time.monotonic())))
        if self.connected:
            self.client.leave()
        self.client.close()

    def _set_connected(self, connected: bool, reason: str = "") -> None:
        if self.connected == connected:
            return
        with self.node.connection_changed:
            self.connected = connected
            self.node.connection_changed.notify_all()
        if connected:
            self.node.event("connected", self.home, node_id=self.client.node_id)
        else:
            self.node.event("disconnected", self.home, reason=reason)

    # Polling ------------------------------------------------------------------------------------

    def _poll(self) -> None:
        backoff = Backoff(cap=BACKOFF_CAP)
        pace = PollPace()
        joined = False
        stopped = self.node.stopped
        while not stopped.is_set():
            try:
                if not joined:
                    self._join_home()
                    joined = True
                    pace.activity()
                if not self._may_pull(pace):
                    continue
                began = time.monotonic()
                pulled = self.client.pull()
                self._set_connected(True)
                backoff.reset()
                if pulled is None:
                    stopped.wait(pace.after(time.monotonic() - began))
                    continue
                pace.activity()
                self._receive(pulled)
                pace.activity()
            except NodeForgotten as fault:
                joined = False
                self._set_connected(False, str(fault))
                stopped.wait(backoff.next())
            except HomeUnavailable as fault:
                self._set_connected(False, str(fault))
                stopped.wait(backoff.next())
            except HomeFault as fault:
                self.node.event("refused", self.home, reason=str(fault))
                stopped.wait(backoff.next())
            if self._lost.is_set():
                joined = False

    def _join_home(self) -> None:
        node_id = self.client.join(self.node.ids.get(self.home.address))
        self._session += 1
        self._lost.clear()
        self.node.ids.set(self.home.address, node_id)
        self._set_connected(True)

    def _may_pull(self, pace: PollPace) -> bool:
        """Wait a little while the lane is busy; with side types there may be one to serve beside it."""
        if self.node.side_types:
            return True
        with self.node.lane_free:
            if self._busy or self.node.lane.locked():
                self.node.lane_free.wait(1.0)
                pace.activity()
                return False
        return True

    def _receive(self, pulled: Pulled) -> None:
        metadata = pulled.message.metadata
        try:
            message = self.client.fetch(pulled, metadata.created_at + metadata.ttl)
        except (MessageGone, PayloadError) as fault:
            self.node.event("dropped", self.home, message_type=metadata.message_type, reason=str(fault))
            return
        self.node.event(
            "message",
            self.home,
            message_type=metadata.message_type,
            run_id=metadata.run_id,
            group_id=metadata.group_id,
        )
        if metadata.message_type in self.node.side_types:
            self._answer(message, side=True)
            return
        with self._work:
            self._busy = True
            self._queue.append((self._session, message))
            self._work.notify_all()

    # Heartbeat ----------------------------------------------------------------------------------

    def _beat(self) -> None:
        stopped = self.node.stopped
        wait = 1.0
        while not stopped.wait(wait):
            if not self.client.node_id or self._lost.is_set():
                wait = 0.5
                continue
            try:
                self.client.beat()
                wait = HEARTBEAT_EVERY * random.uniform(0.9, 1.0)
            except NodeForgotten:
                self._lost.set()
                wait = 0.5
            except HomeFault:
                wait = 2.0

    # Serving ------------------------------------------------------------------------------------

    def _serve(self) -> None:
        node = self.node
        while True:
            with self._work:
                self._busy = bool(self._queue)
                if not self._busy:
                    with node.lane_free:
                        node.lane_free.notify_all()
                    self._work.wait_for(lambda: self._queue or node.stopped.is_set())
                if node.stopped.is_set():
                    return
                session, message = self._queue.popleft()
            if session != self._session:
                self._drop(message, "the server was restarted")
                continue
            self._answer(message, side=False)

    def _drop(self, message: Message, reason: str) -> None:
        self.node.event("dropped", self.home, message_type=message.metadata.message_type, reason=reason)

    def _answer(self, message: Message, *, side: bool) -> None:
        metadata = message.metadata
        session = self._session
        began = time.monotonic()
        try:
            if side:
                reply = self._call_app(message, side=True)
            else:
                with self.node.lane:
                    if self.node.stopped.is_set():
                        return
                    began = time.monotonic()
                    reply = self._call_app(message, side=False)
        except MessageGone as fault:
            self._drop(message, str(fault))
            return
        finally:
            with self.node.lane_free:
                self.node.lane_free.notify_all()
        runtime = time.monotonic() - began
        packed = pack(reply)
        give_up_at = metadata.created_at + metadata.ttl
        backoff = Backoff(cap=BACKOFF_CAP)
        while True:
            try:
                wanted = self.client.push(reply, packed, runtime, give_up_at)
            except HomeUnavailable as fault:
                if (
                    time.time() > give_up_at
                    or session != self._session
                    or self.node.stopped.wait(backoff.next())
                ):
                    self._drop(message, str(fault))
                    return
            except HomeFault as fault:
                self._drop(message, str(fault))
                return
            else:
                facts = {"message_type": metadata.message_type, "seconds": runtime, "wanted": wanted}
                self.node.event("reply", self.home, **facts)
                return

    def _call_app(self, message: Message, *, side: bool) -> Message:
        """Call the app; whatever it raises becomes an Error reply, and the node lives on."""
        try:
            run_key, config = self._run_of(message)
            state = self.node.contexts.load(run_key)
            context = Context(
                run_id=message.metadata.run_id,
                node_id=self.client.node_id,
                node_config=dict(self.node.node_config),
                state=state,
                run_config=config,
            )
            reply = self.node.app(message, context)
            if not isinstance(reply, Message):
                raise TypeError(f"the app returned a {type(reply).__name__}, not a Message")
            if not side:
                self.node.contexts.save(run_key, context.state)
        except MessageGone:
            raise
        except Exception as fault:  # noqa: BLE001 - a user's code may raise anything; the server is told
            reason = f"{type(fault).__name__}: {' '.join(str(fault).split())}"[:500]
            self.node.event("error", self.home, message_type=message.metadata.message_type, reason=reason)
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        return reply

    def _run_of(self, message: Message) -> tuple[str, UserConfig]:
        """Return the key of the run's state, and the run's configuration; strip the reserved record."""
        if message.has_content() and isinstance(record := message.content.get(RUN_RECORD), ConfigRecord):
            kept = {key: value for key, value in message.content.items() if key != RUN_RECORD}
            message.content = RecordDict(kept)
            return parse_run_record(record)
        run_id = message.metadata.run_id
        return f"flwr-{run_id}", self.runs.get(run_id)[1]
