"""The parts of a node that need no server: state folder, key, run states, waits, upload turns, the reserved record."""

from __future__ import annotations

import json
import random
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from flwr.app import ConfigRecord, RecordDict

from espalier.errors import StateError
from espalier.flower import fleet_client
from espalier.flower.backoff import Backoff, PollPace
from espalier.flower.fleet_client import FleetClient
from espalier.flower.node_state import (
    ContextStates,
    HomeIds,
    StateLock,
    load_key,
    load_or_make_key,
    write_atomic,
)
from espalier.flower.run_info import parse_run_record
from espalier.flower.upstream_session import BESIDE, Desk, HomeLoop
from espalier.flower.upstreams import Home
from espalier_edge.fleet.uploads import Upload, Uploads

HOLD = """
import pathlib, sys
from espalier.flower.node_state import StateLock
lock = StateLock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_on_a_state_folder_is_refused_until_the_first_one_dies(tmp_path: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(
            StateError, match=f"in use by process {first.pid}; stop it or choose another --state"
        ):
            StateLock(tmp_path)
    finally:
        first.kill()
        first.wait()
    StateLock(tmp_path).release()


def test_a_state_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="choose another --state"):
        StateLock(tmp_path / "file" / "state")


def test_a_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    key = load_or_make_key(tmp_path / "node.key")
    assert stat.S_IMODE((tmp_path / "node.key").stat().st_mode) == 0o600
    assert load_or_make_key(tmp_path / "node.key").private_numbers() == key.private_numbers()


def test_a_key_in_openssh_form(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    (tmp_path / "key").write_bytes(key.private_bytes(*form))
    assert load_key(tmp_path / "key").private_numbers() == key.private_numbers()


def test_keys_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot read the key"):
        load_key(tmp_path / "absent")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(StateError, match="no private key"):
        load_key(tmp_path / "text")
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "rsa").write_bytes(rsa.generate_private_key(65537, 1024).private_bytes(*form))
    with pytest.raises(StateError, match="no elliptic-curve key"):
        load_key(tmp_path / "rsa")


def test_home_ids_outlive_the_process_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "homes.json"
    HomeIds(path).set("a:1", 2**63 + 5)
    assert HomeIds(path).get("a:1") == 2**63 + 5
    path.write_text("[1")
    assert HomeIds(path).get("a:1") is None


def test_an_atomic_write_leaves_no_part(tmp_path: Path) -> None:
    write_atomic(tmp_path / "x", b"1")
    write_atomic(tmp_path / "x", b"2")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("x", b"2")]
    with pytest.raises(StateError, match="cannot write"):
        write_atomic(tmp_path / "absent" / "x", b"1")


def test_run_states_are_restored_and_only_the_newest_kept(tmp_path: Path) -> None:
    states = ContextStates(tmp_path, keep=2)
    for run in ("one", "../two", "three"):
        state = states.load(run)
        assert states.load(run) is state
        state["c"] = ConfigRecord({"run": run})
        states.save(run, state)
    again = ContextStates(tmp_path, keep=2)
    assert again.load("one") == RecordDict()
    assert again.load("../two") == RecordDict({"c": ConfigRecord({"run": "../two"})})
    assert len(list(tmp_path.iterdir())) == 2


def test_an_empty_state_leaves_no_file_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    states = ContextStates(tmp_path)
    states.save("run", states.load("run"))
    assert list(tmp_path.iterdir()) == []
    states.save("run", RecordDict({"c": ConfigRecord({"k": "v"})}))
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"\xff\xff\xff")
    with pytest.raises(StateError, match="damaged"):
        ContextStates(tmp_path).load("run")


def test_backoff_grows_with_jitter_to_its_cap_and_starts_again() -> None:
    backoff = Backoff(first=0.2, cap=10.0, generator=random.Random(0))
    waits = [backoff.next() for _ in range(12)]
    for tries, wait in enumerate(waits):
        span = min(10.0, 0.3 * 2**tries)
        assert span / 2 <= wait <= span
    assert len(set(waits[-4:])) == 4
    backoff.reset()
    assert backoff.next() <= 0.3


def test_the_pace_of_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [50.0]
    monkeypatch.setattr("espalier.flower.backoff.time", SimpleNamespace(monotonic=lambda: clock[0]))
    pace = PollPace(fast=0.01, slow=1.0, share=0.1)
    assert pace.after(took=1.0) == 0.0  # it was held
    waits = []
    for idle in (0.0, 0.05, 0.5, 3.0, 60.0):
        clock[0] = 50.0 + idle
        waits.append(round(pace.after(took=0.002), 6))
    assert waits == [0.01, 0.01, 0.05, 0.3, 1.0]
    pace.activity()
    assert pace.after(took=0.002) == 0.01


def test_uploads_take_turns() -> None:
    uploads = Uploads(slots=1)
    first, second = Upload(1, "a", big=True), Upload(2, "b", big=True)
    assert uploads.admit(first, lambda: True)
    assert uploads.admit(Upload(3, "small", big=False), lambda: True)
    admitted = threading.Event()

    def second_one() -> None:
        if uploads.admit(second, lambda: True):
            admitted.set()

    thread = threading.Thread(target=second_one)
    thread.start()
    assert not admitted.wait(0.2)
    assert uploads.release("a") is first
    assert admitted.wait(5)
    thread.join()


def test_an_upload_that_nobody_wants_any_more_does_not_wait() -> None:
    uploads = Uploads(slots=1)
    assert uploads.admit(Upload(1, "a", big=True), lambda: True)
    assert not uploads.admit(Upload(2, "b", big=True), lambda: False)
    assert uploads.waiting == 0


def test_uploads_without_progress_are_named() -> None:
    uploads = Uploads(slots=1, stall=0.0)
    upload = Upload(1, "a", big=True, reply_id="r", session_id="s", pending={"x", "y"})
    assert uploads.admit(upload, lambda: True)
    assert uploads.find("s") is upload
    assert uploads.find("") is None
    assert uploads.stalled() == [upload]
    assert not uploads.arrived(upload, "x")
    assert uploads.arrived(upload, "y")
    assert uploads.stalled() == []


def test_the_reserved_record() -> None:
    config = {"lr": 0.1, "n": 3, "flag": True, "name": "x"}
    assert parse_run_record(ConfigRecord({"run": "r1", "config": json.dumps(config).encode()})) == (
        "r1",
        config,
    )


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"config": b"{}"}, "no run id"),
        ({"run": "r"}, "no configuration"),
        ({"run": "r", "config": b"[]"}, "no JSON object"),
        ({"run": "r", "config": b'{"a": [1]}'}, "'a' a list"),
        ({"run": "r", "config": b"{"}, "Expecting"),
    ],
)
def test_a_malformed_reserved_record(record: dict[str, str | bytes], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        parse_run_record(ConfigRecord(dict(record)))


class _Busy(HomeLoop):
    """A home's loop without a home, in the middle of a call of the app."""

    def __init__(self) -> None:
        self.desk = cast(
            Desk,
            SimpleNamespace(
                stopped=threading.Event(), lane=threading.Lock(), lane_free=threading.Condition()
            ),
        )
        self._busy = True


def test_a_node_polls_seldom_beside_a_call_and_at_once_when_it_is_done() -> None:
    loop, pace = _Busy(), PollPace(fast=0.001, slow=60.0)
    began = time.monotonic()
    loop._rest(pace, 0.0)
    assert time.monotonic() - began >= BESIDE
    cold = PollPace(fast=0.001, slow=60.0)
    cold._active_at -= 600.0
    assert cold.after(0.0) > 50.0
    resting = threading.Thread(target=loop._rest, args=(cold, 0.0))
    resting.start()
    with loop.desk.lane_free:
        loop._busy = False
        loop.desk.lane_free.notify_all()
    resting.join(10)
    assert not resting.is_alive()
    # Its pace begins anew: not at the minute that it had come to.
    assert cold.after(0.0) < 1.0
    # A server that holds polls is asked again at once.
    loop._busy = True
    began = time.monotonic()
    loop._rest(pace, 1.0)
    assert time.monotonic() - began < BESIDE


def test_objects_that_are_on_their_way_are_waited_for_once_and_not_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rests: list[float] = []
    there: set[str] = set()

    class Stopped(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            rests.append(timeout or 0.0)
            there.update(objects)  # all come while the first one is waited for
            return False

    objects = [f"{n}" for n in range(6)]
    key = ec.generate_private_key(ec.SECP256R1())
    client = FleetClient(Home("127.0.0.1:1", insecure=True), key, Stopped())
    # The server answers a call when it is made, not when the answer is looked at.
    begin = lambda method, object_id: SimpleNamespace(object_available=object_id in there)  # noqa: E731
    monkeypatch.setattr(client, "_line", SimpleNamespace(begin=begin, close=lambda: None))
    monkeypatch.setattr(fleet_client, "outcome", lambda call: call)
    got: list[str] = []

    def took(object_id: str, answer: Any) -> bool:
        if answer.object_available:
            got.append(object_id)
        return bool(answer.object_available)

    client._all("PullObject", objects, lambda object_id: object_id, took, time.time() + 60)
    assert sorted(got) == objects
    assert len(rests) == 1
    assert rests[0] < 0.02
