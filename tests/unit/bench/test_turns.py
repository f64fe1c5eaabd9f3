from __future__ import annotations

import time

import pytest
from bench.train import COMPILED, Case, Seconds, compiling, over, take_turns, torch_threads


def test_turns_alternate_and_the_first_is_a_warm_up() -> None:
    seen: list[tuple[str, int]] = []
    waits: list[int] = []
    sides = {name: lambda number, name=name: seen.append((name, number)) for name in "abc"}
    wall, processor = take_turns(sides, 2, lambda: waits.append(len(seen)))
    assert seen == [(name, number) for number, order in enumerate(("abc", "cba", "abc")) for name in order]
    assert {name: len(taken) for name, taken in wall.items()} == {"a": 2, "b": 2, "c": 2}
    assert {name: len(taken) for name, taken in processor.items()} == {"a": 2, "b": 2, "c": 2}
    assert waits == [at + end for at in range(9) for end in (0, 1)], "a turn began or ended unwaited for"


def test_sleep_takes_wall_and_no_processor_time() -> None:
    wall, processor = take_turns({"sleeps": lambda number: time.sleep(0.05)}, 1)
    assert wall["sleeps"][0] >= 0.05
    assert processor["sleeps"][0] < 0.04


def test_a_ratio_is_taken_within_turns() -> None:
    """Where a machine slows down between turns, medians of the sides say nothing."""
    ours, loop = [1.0, 10.0, 2.0, 20.0, 4.0], [2.0, 20.0, 4.0, 40.0, 8.0]
    assert over(ours, loop) == pytest.approx(2)
    assert over([1.0, 1.0, 4.0], [1.0, 3.0, 8.0]) == pytest.approx(2)


def test_compiling_pays_once_the_steps_have_saved_what_it_took() -> None:
    """Turns of 4 steps: 0.5 s a step, compiled 0.4 s; a first turn of 31.6 s is 30 s of compiling."""
    case = Case("unet-tiny", (1, 8, 8), 8, steps=4, turns=2, starts=1)
    took = Seconds({"client": [2.0, 2.0], COMPILED: [1.6, 1.6]}, {}, first=31.6)
    assert compiling(case, took) == pytest.approx({"compile_s": 30.0, "compile_pays_after_steps": 300.0})
    slower = Seconds({"client": [1.6, 1.6], COMPILED: [1.6, 1.6]}, {}, first=31.6)
    assert compiling(case, slower)["compile_pays_after_steps"] is None


def test_a_case_has_its_threads_and_torch_its_own_afterwards() -> None:
    import torch

    own = torch.get_num_threads()
    with torch_threads(own + 1):
        assert torch.get_num_threads() == own + 1
        with torch_threads(0):
            assert torch.get_num_threads() == own + 1
    assert torch.get_num_threads() == own
