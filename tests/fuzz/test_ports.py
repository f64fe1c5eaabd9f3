"""Mutated messages at live ports: an edge, its live view and a client go on with their work beside them."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import grpc
import numpy as np
import psutil
from flwr.app import ConfigRecord, Message, RecordDict
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from espalier.wire import control
from espalier.wire.sections import SectionId
from espalier.wire.signature import payload_digest
from espalier_proto import espalier_pb2 as pb
from espalier_server.run import TreeRun
from tests.fuzz.attacks import Attacker, monitor_requests, requests
from tests.fuzz.mutate_arrays import mutate_content
from tests.support.calls import call, device
from tests.support.flower_helpers import fleet, online
from tests.support.processes import free_port, running, superlink, wait_until
from tests.support.tree import LiveTree, espalier, process_environment, start_client, start_edge

#: Messages at ports: a tenth of all.
COUNT = int(os.environ.get("FUZZ") or 600) // 10
SEED = int(os.environ.get("FUZZ_SEED") or 1)
#: How much a process may grow meanwhile, in bytes.
GROWTH = 150 * 2**20


def rss(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


def tensors(run: TreeRun) -> dict[tuple[SectionId, str], bytes]:
    assert run.state is not None
    sections = run.state.payload.views()
    return {(s, name): array.tobytes() for s, arrays in sections.items() for name, array in arrays.items()}


class Siege:
    """Attackers that throw their share, at least while something else is going on."""

    def __init__(self, attackers: list[Attacker], count: int) -> None:
        self._attackers, self._count = attackers, count
        self._over = threading.Event()
        self.thrown: Counter[int] = Counter()
        self._threads = [threading.Thread(target=self._throw, args=(i,)) for i in range(len(attackers))]

    def __enter__(self) -> Siege:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        for attacker in self._attackers:
            attacker.close()

    def _throw(self, index: int) -> None:
        while not self._over.is_set() or self.thrown[index] < self._count:
            self._attackers[index].throw(Random(f"{SEED}/{index}/{self.thrown[index]}"))
            self.thrown[index] += 1
            if self.thrown[index] >= self._count:
                self._over.wait(0.05)


def test_an_edge_and_its_live_view_under_attack(tmp_path: Path) -> None:
    """The model is, bit for bit, that of a run without attackers."""
    with ExitStack() as stack:
        tree = LiveTree(stack.enter_context(superlink(tmp_path / "link")), tmp_path)
        monitor = f"127.0.0.1:{free_port()}"
        address = stack.enter_context(start_edge(tree, "edge-1", "--monitor", monitor))
        client = stack.enter_context(start_client(tree, "c0", "digits:0/40", ["edge-1"]))
        wait_until(lambda: "connected to" in tree.log("c0"), 90, "the client")
        settings: dict[str, bool | int | float | str] = {
            "method": "fedavg",
            "model": "mlp",
            "rounds": 2,
            "rg": 1,
            "min-edges": 1,
            "min-clients": 1,
            "reproducible": True,
            "seed": 4,
        }
        quiet = tensors(tree.run_flat("quiet", settings))
        edge = next(
            p.pid for p in psutil.Process().children(recursive=True) if {"edge", "edge-1"} <= set(p.cmdline())
        )
        before = rss(edge)
        attackers = [Attacker(address, requests()), Attacker(monitor, monitor_requests())]
        with Siege(attackers, COUNT // 2) as siege:
            besieged = tree.run_flat("besieged", settings)
        assert tensors(besieged) == quiet
        assert besieged.recorder.record.faults == []
        assert all(psutil.pid_exists(pid) for pid in (edge, client))
        assert rss(edge) - before < GROWTH
        for name, at in (("Fleet", address), ("Monitor", monitor)):
            with grpc.insecure_channel(at) as channel:
                answer = HealthStub(channel).Check(HealthCheckRequest(), timeout=10)
                assert answer.status == 1, name
        for name, attacker, thrown in zip(
            ("Fleet", "Monitor"), attackers, [siege.thrown[i] for i in range(2)], strict=True
        ):
            print(
                f"\n{name} port: {thrown} thrown, slowest {attacker.slowest:.1f} s, {dict(attacker.answers)}"
            )
            assert attacker.slowest < 15
            assert not attacker.answers["no end"]
        assert attackers[0].answers.total() >= COUNT // 2
        # Nobody was admitted: a push without a node, or an object that nobody asked for, is in no store.
        granted = {"answered PullMessages", "answered GetRun", "answered GetFab", "answered PullObject"}
        assert not granted & set(attackers[0].answers)


def test_a_client_and_a_hostile_server(tmp_path: Path) -> None:
    """A client refuses each mutated plan by name, lives, and does the next sound one as before."""
    made = call(device(), method="fedavg", model="mlp", seed=3)
    with fleet() as server:
        command = espalier("client", "--name", "c", "--state", str(tmp_path / "c"), "--threads", "1")
        command += ["--data", "digits:0/32", "--edge", f"127.0.0.1:{server.port}", "--device", "cpu"]
        with running(command, tmp_path / "c.log", process_environment(tmp_path)) as process:
            [node] = online(server, 1, 90)
            grid = server.open_run()

            def ask(content: RecordDict, kind: str) -> Message:
                [reply] = grid.exchange([grid.create_message(content, kind, node, "1")], deadline=60)
                return reply

            def plan(**changes: Any) -> RecordDict:
                return control.plan_content(made.plan(**changes), made.sent)

            good = {control.INQUIRY: plan(inquiry="loss"), control.TRAIN: plan()}
            hello = RecordDict({control.CONFIG: ConfigRecord({"run": "r", "histogram-epsilon": 0.0})})

            def work() -> tuple[float, bytes]:
                asked, trained = (ask(good[kind], kind) for kind in (control.INQUIRY, control.TRAIN))
                assert asked.has_content(), asked.error
                assert trained.has_content(), trained.error
                loss = control.read_control(pb.ClientReport, asked, "c").loss
                return loss, payload_digest(control.array_records(trained.content))

            assert ask(hello, control.HELLO).has_content()
            first, before = work(), rss(process.pid)
            answers: Counter[str] = Counter()
            strange: list[str] = []
            for number in range(COUNT // 2):
                rng = Random(f"{SEED}/client/{number}")
                kind = rng.choice((control.INQUIRY, control.TRAIN, control.HELLO, control.REFUSAL))
                content = good.get(kind, hello)
                protos = [(control.CONFIG, control.PLAN, pb.RoundPlan)] if kind in good else []
                changed = keep_settings(mutate_content(content, rng, protos))
                reply = ask(changed, kind)
                answers[_what(reply)] += 1
                if reply.has_error() and not str(reply.error.reason).startswith(REFUSALS):
                    strange.append(f"{number} {kind}: {reply.error.reason}")
                if reply.has_content() and kind in good:
                    report = control.read_control(pb.ClientReport, reply, "c")
                    assert report.client == "c"
                    assert np.isfinite(report.loss)
            assert process.poll() is None
            assert work() == first
            assert rss(process.pid) - before < GROWTH
            print(f"\nclient: {sum(answers.values())} messages, {dict(answers)}")
            assert not strange, strange


#: How a client refuses: by our own errors, or by Flower's where no handler of ours is asked.
REFUSALS = ("WireError", "ConfigError")


def _what(reply: Message) -> str:
    return f"error {str(reply.error.reason).partition(':')[0]}" if reply.has_error() else "answered"


def keep_settings(content: RecordDict) -> RecordDict:
    """Put back the settings: how long a client trains is its server's to say, and a million epochs are no fault."""
    record = content.get(control.CONFIG)
    data = record.get(control.PLAN) if isinstance(record, ConfigRecord) else None
    if not isinstance(record, ConfigRecord) or not isinstance(data, bytes):
        return content
    read: Callable[[bytes], pb.RoundPlan] = pb.RoundPlan.FromString
    try:
        plan = read(data)
    except Exception:  # noqa: BLE001 - not to be read at all, then nothing in it is obeyed
        return content
    plan.settings.CopyFrom(call(device(), method="fedavg", model="mlp", seed=3).settings.to_struct())
    content[control.CONFIG] = ConfigRecord({**record, control.PLAN: plan.SerializeToString()})
    return content
