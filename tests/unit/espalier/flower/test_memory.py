"""What was read through Flower's views is collected soon, what was not costs no collection; freed memory is kept."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import ref

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata

from espalier.flower.arrays import array_from_numpy
from espalier.flower.memory import CycleCollector
from tests.support.paths import ROOT

SIZE = 4000


def message_of(size: int = SIZE) -> tuple[RecordDict, Metadata]:
    record = ArrayRecord({"flat": array_from_numpy(np.zeros(size // 4, np.float32))})
    metadata = Metadata(1, "", 1, 2, "", "", 0.0, 60.0, "train")
    return RecordDict({"arrays": record}), metadata


@contextmanager
def collections() -> Iterator[list[int]]:
    """Count the collections of all generations; none happens by itself."""
    found: list[int] = []

    def count(phase: str, facts: dict[str, int]) -> None:
        if phase == "start" and facts["generation"] == 2:
            found.append(1)

    gc.collect()
    gc.disable()
    gc.callbacks.append(count)
    try:
        yield found
    finally:
        gc.callbacks.remove(count)
        gc.enable()


def test_what_outlives_its_message_is_collected_once_it_is_much() -> None:
    collector = CycleCollector(every=3 * SIZE)
    alive = []
    with collections() as found:
        for number in range(1, 4):
            content, metadata = message_of()
            message = make_message(metadata=metadata, content=content)
            alive.append(ref(content["arrays"]))
            assert len(message.content.array_records) == 1  # makes the cycle
            collector.track(message)
            del message, content
            collector.collect()
            assert len(found) == (number == 3)
    assert [record() for record in alive] == [None, None, None]


def test_what_goes_with_its_message_costs_no_collection() -> None:
    collector = CycleCollector(every=SIZE)
    with collections() as found:
        for _ in range(5):
            content, metadata = message_of()
            message = make_message(metadata=metadata, content=content)
            assert isinstance(message.content["arrays"], ArrayRecord)
            collector.track(message)
            del message, content
            collector.collect()
    assert not found


def test_a_loop_over_replies_triggers_no_collection() -> None:
    collector = CycleCollector(every=SIZE)

    def replies() -> Iterator[Message]:
        for _ in range(5):
            content, metadata = message_of()
            message = make_message(metadata=metadata, content=content)
            collector.collect(but_last=True)
            collector.track(message)
            yield message
            del message, content

    with collections() as found:
        for reply in replies():
            assert isinstance(reply.content["arrays"], ArrayRecord)
        assert not found
        for reply in replies():
            assert len(reply.content.array_records) == 1  # makes the cycle
        assert found


KEEPING = """
import sys
import numpy as np
from espalier.flower import memory

def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])

assert not memory.retains_freed_blocks()
if sys.argv[1] == "keep":
    assert memory.retain_freed_blocks() and memory.retains_freed_blocks()
before = resident()
block = np.ones(40 << 20, np.uint8)
del block
kept = resident() - before
memory.trim_heap()
print(kept >> 20, (resident() - before) >> 20)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="of glibc's allocator"
)
@pytest.mark.parametrize(("how", "least", "most"), [("keep", 35, 45), ("let go", -5, 5)])
def test_freed_blocks_are_kept_until_they_are_given_back(how: str, least: int, most: int) -> None:
    said = subprocess.run(
        [sys.executable, "-c", KEEPING, how],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    kept, left = map(int, said.stdout.split())
    assert least <= kept <= most
    assert left < 5
