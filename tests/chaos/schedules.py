"""Chaos schedules drawn from a seed: what is done to whom, when, and for how long."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from espalier_server.records.events import EVENTS_FILE, read_events
from tests.chaos.cluster import Cluster, ended
from tests.chaos.proxy import Mode, Proxy

Phase = Literal["hello", "down", "train", "up", "aggregation", "checkpoint"]
Action = Literal["kill", "pause", "slow", "lossy", "cut", "partition"]

WINDOWS = 4
#: What a round of these settings takes is a second or so, most of it the clients' training.
SETTINGS: dict[str, bool | int | float | str] = {
    "model": "logistic",
    "rg": 2,
    "rounds": 2 * WINDOWS,
    "local-steps": 60,
    "min-edges": 1,
    "min-clients": 2,
    "round-deadline": 6.0,
    "window-deadline": 20.0,
    "hello-timeout": 120.0,
}
METHODS = ("fedavg", "scaffold", "feddyn")
#: Seconds: shorter than a heartbeat, than a lease, and longer than a lease.
PAUSES = (0.5, 2.0, 4.0, 23.0)


@dataclass(frozen=True)
class Fault:
    """One thing that is done.

    Attributes
    ----------
    tier : str
        "cloud", "superlink", "serverapp", or the name of an edge or client.
    action : str
        See `Action`; links are only cut at edges and clients.
    phase : str
        When, in a window's life.
    window : int
        Which window.
    jitter : float
        Where within the phase, in [0, 1).
    seconds : float
        How long it lasts, or until what was killed is started again.
    """

    tier: str
    action: Action
    phase: Phase
    window: int
    jitter: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.action} {self.tier} in {self.phase} of window {self.window} for {self.seconds:g} s"


@dataclass(frozen=True)
class Schedule:
    """What one seed does."""

    seed: int
    method: str
    faults: tuple[Fault, ...]

    def __str__(self) -> str:
        return f"seed {self.seed} ({self.method}): " + "; ".join(str(fault) for fault in self.faults)


def draw(seed: int, edges: list[str], clients: list[str]) -> Schedule:
    """Draw a schedule of one or two faults; the tiers are equally likely."""
    rng = random.Random(f"espalier chaos {seed}")
    faults = []
    for _ in range(rng.choice((1, 1, 2))):
        kind = rng.choice(("serverapp", "superlink", "edge", "client", "edge", "client", "cloud"))
        tier = {"edge": rng.choice(edges), "client": rng.choice(clients)}.get(kind, kind)
        actions: list[Action] = ["kill", "pause"]
        if kind in ("edge", "client"):
            actions += ["slow", "lossy", "cut", "partition"]
        if kind == "cloud":
            actions = ["kill"]
        faults.append(
            Fault(
                tier=tier,
                action=rng.choice(actions),
                phase=rng.choice(get_args(Phase)),
                window=rng.randint(1, WINDOWS - 1),
                jitter=rng.random(),
                seconds=rng.choices(PAUSES, (3, 4, 3, 1))[0],
            )
        )
    return Schedule(seed, rng.choice(METHODS), tuple(sorted(faults, key=lambda f: f.window)))


class Conductor:
    """Carries a schedule out while its run goes on, and heals the cluster afterwards."""

    def __init__(self, cluster: Cluster, schedule: Schedule, out: Path) -> None:
        self.cluster, self.schedule, self.out = cluster, schedule, out
        self.done: list[Fault] = []
        self.kept: dict[int, str] = {}
        self._timers: list[threading.Timer] = []

    def run(self, timeout: float) -> None:
        """Do what the schedule says and wait for the end of the run.

        Raises
        ------
        TimeoutError
            If the run goes on after `timeout` seconds.
        """
        end = time.monotonic() + timeout
        try:
            for fault in self.schedule.faults:
                if not self._await(fault, end):
                    break
                self._keep()
                self._do(fault)
            while ended(self.out) is None:
                if time.monotonic() > end:
                    raise TimeoutError(f"the run goes on after {timeout:g} s")
                time.sleep(0.1)
        finally:
            for timer in self._timers:
                timer.cancel()
                timer.join()
            self.cluster.heal()

    def _await(self, fault: Fault, end: float) -> bool:
        """Wait for the fault's moment; False if the run ended before."""
        while ended(self.out) is None:
            if time.monotonic() > end:
                raise TimeoutError("the run did not reach the fault's window")
            if (at := self._moment(fault)) is not None:
                time.sleep(max(0.0, at - time.time()))
                return True
            time.sleep(0.005)
        return False

    def _moment(self, fault: Fault) -> float | None:
        """Return when a fault is due, in Unix seconds, once that is known."""
        events = read_events(self.out / EVENTS_FILE)
        times = {
            kind: {e.get("window", 0): e["time"] for e in events if e["event"] == kind}
            for kind in ("run", "window-start", "window-end")
        }
        if fault.phase == "hello":
            return times["run"][0] + fault.jitter if times["run"] else None
        if fault.phase == "checkpoint":
            return times["window-end"].get(fault.window)
        started = times["window-start"].get(fault.window)
        if started is None:
            return None
        former = fault.window - 1
        took = times["window-end"].get(former, 0) - times["window-start"].get(former, 0)
        took = took if 0.2 < took < 5 else 1.5
        first, last = {"down": (0.0, 0.1), "train": (0.1, 0.8), "up": (0.8, 1.0), "aggregation": (1.0, 1.1)}[
            fault.phase
        ]
        return float(started + took * (first + (last - first) * fault.jitter))

    def _keep(self) -> None:
        """Remember what was aggregated and checkpointed before the fault."""
        events = read_events(self.out / EVENTS_FILE)
        safe = {e["window"] for e in events if e["event"] == "checkpoint"}
        losses = {e["window"]: repr(e["losses"]) for e in events if e["event"] == "window-end"}
        self.kept |= {w: losses[w] for w in safe if w in losses}

    def _do(self, fault: Fault) -> None:
        cluster, tier = self.cluster, fault.tier
        if fault.action == "kill":
            if not cluster.kill(tier, self.out):
                return
            if tier in cluster.processes:
                self._later(fault.seconds, lambda: cluster.start(tier))
        elif fault.action == "pause":
            if not cluster.pause(tier, self.out):
                return
            self._later(fault.seconds, cluster.go_on)
        else:
            mode: Mode = fault.action
            proxies = cluster.proxies(tier)
            for proxy in proxies:
                proxy.set(mode)
            self._later(fault.seconds, lambda: _open(proxies))
        self.done.append(fault)

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, action)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)


def _open(proxies: Iterable[Proxy]) -> None:
    for proxy in proxies:
        proxy.set("open")
