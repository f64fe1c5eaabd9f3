"""Seeded chaos on real processes: `make test-chaos`, CHAOS=N schedules, CHAOS_SEED=S for one alone."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.checks import check_run
from tests.chaos.cluster import Cluster
from tests.chaos.schedules import SETTINGS, Conductor, draw

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks at processes as Linux shows them"),
    pytest.mark.timeout(400),
]

#: Schedules per cluster; those after a fault also show that all processes recovered.
PER_CLUSTER = 5
RUN_SECONDS = 180.0


def seeds() -> list[int]:
    if alone := os.environ.get("CHAOS_SEED"):
        return [int(seed) for seed in alone.split(",")]
    first = int(os.environ.get("CHAOS_FROM", "1"))
    return list(range(first, first + int(os.environ.get("CHAOS", "2"))))


class Clusters:
    """The running cluster; replaced every few schedules, and after a failed one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.used = 0
        self.count = 0
        self.cluster: Cluster | None = None

    def get(self) -> Cluster:
        if self.cluster is None or self.used >= PER_CLUSTER:
            self.close()
            self.count += 1
            folder = self.folder / f"cluster-{self.count}"
            folder.mkdir()
            self.cluster, self.used = Cluster(folder), 0
        self.used += 1
        return self.cluster

    def close(self) -> None:
        if self.cluster is not None:
            cluster, self.cluster = self.cluster, None
            assert cluster.close() == [], f"processes were left over; see {cluster.folder}"


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clusters]:
    held = Clusters(tmp_path_factory.mktemp("chaos"))
    yield held
    held.close()


@pytest.mark.parametrize("seed", seeds())
def test_a_run_survives(seed: int, clusters: Clusters, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = clusters.get()
    schedule = draw(seed, cluster.edges, cluster.clients)
    out = cluster.folder / "runs" / f"seed-{seed}"
    began = time.monotonic()
    try:
        cluster.submit(out, {**SETTINGS, "method": schedule.method})
        conductor = Conductor(cluster, schedule, out)
        conductor.run(RUN_SECONDS)
        record = check_run(conductor)
    except BaseException:
        with capsys.disabled():
            print(f"\nFAILED {schedule}\n  repeat: make test-chaos CHAOS_SEED={seed}; logs: {cluster.folder}")
        clusters.used = PER_CLUSTER
        raise
    with capsys.disabled():
        print(f"\n{schedule}\n  {time.monotonic() - began:.0f} s, faults {record.fault_counts}")
