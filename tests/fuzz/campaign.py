"""Throwing mutants at a decoder: each must be refused by the project's own error, or be sound, and soon."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from types import FrameType
from typing import Any

import numpy as np

from espalier.errors import EspalierError

#: Seconds of processor time, seconds of the clock (for what waits: a busy machine is no fault of a decoder) and bytes
#: that one message may take.
LONGEST, LONGEST_WAIT = 5.0, 60.0
MOST_MEMORY = 256 * 2**20


class Hang(BaseException):
    """A decoder took too long; no handler of the code on trial may swallow it."""


@dataclass
class Case:
    """One place where something received is decoded.

    Attributes
    ----------
    name : str
        Who reads what.
    mutant : callable
        Makes one from a Random.
    feed : callable
        Gives it to the decoder and returns what that made of it.
    unsound : callable
        An independent look at what was accepted: what is wrong with it, "" if nothing.
    refusals : tuple of type
        Errors that are refusals here; others are faults.
    valid : callable
        Feeds what was really sent; must not raise.
    share : float
        Weight among the cases: slow ones get fewer mutants.
    """

    name: str
    mutant: Callable[[Random], Any]
    feed: Callable[[Any], Any]
    unsound: Callable[[Any, Any], str]
    valid: Callable[[], object]
    refusals: tuple[type[BaseException], ...] = (EspalierError,)
    share: float = 1.0


@dataclass
class Tally:
    """What became of a case's mutants."""

    case: str
    sent: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    sound: int = 0
    faults: list[str] = field(default_factory=list)


@contextmanager
def bounded() -> Iterator[None]:
    """Raise Hang after `LONGEST` seconds of work, or `LONGEST_WAIT` of waiting."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Hang(
            f"no end after {LONGEST:g} s of work"
            if number == signal.SIGPROF
            else f"no end after {LONGEST_WAIT:g} s"
        )

    limits = (
        (signal.SIGPROF, signal.ITIMER_PROF, LONGEST),
        (signal.SIGALRM, signal.ITIMER_REAL, LONGEST_WAIT),
    )
    former = {number: signal.signal(number, late) for number, _, _ in limits}
    for _, timer, seconds in limits:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for number, timer, _ in limits:
            signal.setitimer(timer, 0)
            signal.signal(number, former[number])


def peak() -> int:
    """Return the most memory that this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def throw(case: Case, count: int, seed: int) -> Tally:
    """Throw `count` mutants at a case."""
    tally = Tally(case.name)
    for number in range(count):
        if fault := throw_one(case, f"{seed}/{case.name}/{number}", tally):
            tally.faults.append(f"{case.name}, mutant {seed}/{case.name}/{number}: {fault}")
    return tally


def throw_one(case: Case, seed: str, tally: Tally) -> str:
    """Throw the mutant of a seed; return what is wrong with what became of it, "" if nothing."""
    mutant = case.mutant(Random(seed))
    before, start = peak(), time.process_time()
    tally.sent += 1
    fault = ""
    try:
        with bounded(), np.errstate(all="ignore"):
            made = case.feed(mutant)
    except case.refusals as error:
        tally.refused[type(error).__name__] += 1
        if isinstance(error, EspalierError) and not str(error):
            fault = "refused without a word"
    except Hang as error:
        fault = str(error)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what we look for
        import traceback

        where = traceback.extract_tb(error.__traceback__)[-1]
        own = [f for f in traceback.extract_tb(error.__traceback__) if "/tests/" not in f.filename][-3:]
        path = " < ".join(f"{os.path.basename(f.filename)}:{f.lineno}" for f in reversed(own))
        fault = f"{type(error).__name__}: {str(error)[:200]} ({where.name}; {path})"
    else:
        fault = case.unsound(mutant, made)
        tally.sound += not fault
    if (grown := peak() - before) > MOST_MEMORY:
        fault = fault or f"{grown / 2**20:.0f} MiB for one message"
    if (took := time.process_time() - start) > LONGEST:
        fault = fault or f"{took:.1f} s of work for one message"
    return fault
