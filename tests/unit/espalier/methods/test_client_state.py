"""Client state of SCAFFOLD and FedDyn across sub-networks, late clients and discarded rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from espalier.methods.feddyn import DynamicRegularizer
from espalier.methods.scaffold import CONTROL, ControlVariates
from espalier.training.objectives import Objective
from espalier.wire.sections import SectionId
from espalier_server.run import TreeRun
from tests.support.by_hand import (
    kept,
    mean_kept,
    run_tree,
    same,
    small_tree,
    tapped,
)
from tests.support.terms import local_round, moved, network, received, result


class Vector(nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(values))
        self.register_buffer("counter", torch.tensor(1.0))


@pytest.mark.parametrize(
    ("term", "prefix"), [(DynamicRegularizer(0.5), "dyn/"), (ControlVariates(), "scaffold/")]
)
def test_a_sub_network_uses_the_leading_block(term: Objective, prefix: str) -> None:
    """The level changes from round to round: kept 3 long, trained 2 long, then 4 long."""
    state = {prefix + "theta": np.array([1.0, 2.0, 3.0], np.float32)}
    small = Vector(0.0, 0.0)
    term.begin(small, local_round(small, state=state))
    term.end(small, result(lr_sum=1.0), {"theta": torch.tensor([2.0, 0.0]), "counter": torch.tensor(0.0)})
    # w - y = (-2, 0): FedDyn adds -alpha (y - w), SCAFFOLD adds (w - y) / (K eta), c being 0.
    moved_by = -1.0 if prefix == "dyn/" else -2.0
    assert state[prefix + "theta"].tolist() == [1.0 + moved_by, 2.0, 3.0]
    large = Vector(0.0, 0.0, 0.0, 0.0)
    term.begin(large, local_round(large, state=state))
    term.end(large, result(), received(large))
    assert state[prefix + "theta"].tolist() == [1.0 + moved_by, 2.0, 3.0, 0.0]


def test_control_variates_and_regularisers_hold_parameters_only() -> None:
    for term in (DynamicRegularizer(0.1), ControlVariates()):
        model = network("cnn-bn")
        local = local_round(model)
        term.begin(model, local)
        term.end(model, result(), received(moved(model)))
        names = {key.partition("/")[2] for key in local.state}
        assert names == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "section", "prefix"), [("scaffold", "control", "scaffold/"), ("feddyn", "dyn", "dyn/")]
)
def test_clients_that_join_late_count_as_zeros(
    name: str, section: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = small_tree(tmp_path, 6)
    late = [node for below in tree.edges for node in below if node.config["name"] in ("c4", "c5")]
    for node in late:
        node.online = False
    populations: list[int] = []
    window = TreeRun._window

    def and_then_they_come(self: TreeRun, *args: Any) -> None:
        window(self, *args)
        populations.append(args[1].population)
        for node in late if len(populations) == 2 else []:
            node.online = True

    monkeypatch.setattr(TreeRun, "_window", and_then_they_come)
    run = run_tree(tree, name, 4, rounds=12, rg=2, fraction=0.5)
    assert run.state is not None
    assert populations[:2] == [4, 4]
    assert populations[-1] == 6
    assert kept(tmp_path, "c4") or kept(tmp_path, "c5")
    found = run.state.section(SectionId(section))
    same(found, mean_kept(tmp_path, [f"c{i}" for i in range(6)], prefix, found), atol=2e-6)


def test_a_round_below_quorum_leaves_no_trace_at_its_clients(tmp_path: Path) -> None:
    """Every round of c2, alone at its edge, is discarded: it starts from its initial state, and c counts it as zero."""
    tree = small_tree(tmp_path, 3, reach=lambda i: (i // 2,))
    calls = tapped(tree)
    run = run_tree(tree, "scaffold", 3, rounds=4, rg=2, quorum=2)
    assert run.state is not None
    starts = {
        c: [(x.plan.start.window, x.plan.start.round) for x in calls if x.plan.client == c]
        for c in ("c0", "c2")
    }
    assert starts == {"c0": [(0, 0), (1, 1), (1, 2), (2, 3)], "c2": [(0, 0)] * 4}
    assert [(f.node, f.kind) for f in run.recorder.record.faults] == [("edge-2", "quorum")] * 4
    c = run.state.section(CONTROL)
    of_two = mean_kept(tmp_path, ["c0", "c1"], "scaffold/", c)
    same(c, {n: a * 2 / 3 for n, a in of_two.items()}, atol=2e-6)
