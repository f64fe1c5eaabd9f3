"""Checkpoints of schema 1: prefixes of tensor names become sections."""

from __future__ import annotations

import numpy as np
import pytest

from espalier.wire.payload import Layout
from espalier.wire.sections import MODEL, SectionId
from espalier_proto import espalier_pb2 as pb
from espalier_server.records.snapshot import Snapshot

ONE = np.ones(2, np.float32)


def unpacked(state: dict[str, np.ndarray], extra: dict[str, np.ndarray], *, ema: bool = False) -> Snapshot:
    """Return the snapshot of a checkpoint as schema 1 wrote it."""
    layout = Layout.of(state)
    own = Layout(tuple(t for t in layout.tensors if "/" not in t.name))
    architecture = pb.ArchitectureSpec(tensors=own.to_proto().tensors)
    tensors = {f"model/{n}": a for n, a in state.items()} | {f"extra/{n}": a for n, a in extra.items()}
    if ema:
        tensors |= {f"ema/{n}": state[n] for n in own.names}
    meta = {
        "window": 2,
        "round": 4,
        "pruned": False,
        "architecture": architecture.SerializeToString().hex(),
        "layout": layout.to_proto().SerializeToString().hex(),
        "population": 3,
        "peers": {},
        "reached": {"c0": [2, 4]},
    }
    return Snapshot.unpack(tensors, meta)


@pytest.mark.parametrize(
    ("name", "section", "tensor"),
    [
        ("conv.weight", MODEL, "conv.weight"),
        ("control/conv.weight", SectionId("control"), "conv.weight"),
        ("dyn/conv.weight", SectionId("dyn"), "conv.weight"),
        ("head/0.weight", SectionId("head"), "0.weight"),
        ("cluster12/conv.weight", SectionId("cluster", "12"), "conv.weight"),
        ("depth2/stage2.w", SectionId("depth", "2"), "stage2.w"),
        ("own/depth2/stage2.w", SectionId("own", "2"), "stage2.w"),
        ("next/depth2/stage2.w", SectionId("next", "2"), "stage2.w"),
        ("p0.25/norm.running_mean", SectionId("width", "0.25"), "norm.running_mean"),
        ("peer/cam-7/conv.weight", SectionId("peer", "cam-7"), "conv.weight"),
        ("table/mean", SectionId("table"), "mean"),
        ("pairs/images", SectionId("pairs"), "images"),
        ("handout/labels", SectionId("handout"), "labels"),
        ("limit/loss", SectionId("limit"), "loss"),
    ],
)
def test_a_prefix_becomes_a_section(name: str, section: SectionId, tensor: str) -> None:
    state = unpacked({name: ONE}, {}).state
    assert list(state.payload) == [section]
    assert {n: a.tolist() for n, a in state.section(section).items()} == {tensor: [1.0, 1.0]}


def test_what_the_cloud_remembers_becomes_sections() -> None:
    extra = {
        "cluster/c0": ONE,
        "given/c1": ONE,
        "transformer/0.weight": ONE,
        "selection/loss/c0": ONE,
        "selection/gradient/c1": ONE,
        "selection/size": ONE,
    }
    memory = unpacked({"w": ONE}, extra).state.memory
    assert {section: list(arrays) for section, arrays in memory.items()} == {
        SectionId("membership"): ["c0"],
        SectionId("given"): ["c1"],
        SectionId("transformer"): ["0.weight"],
        SectionId("selection", "loss"): ["c0"],
        SectionId("selection", "gradient"): ["c1"],
        SectionId("selection", "size"): ["size"],
    }


def test_a_checkpoint_of_schema_1_is_written_in_the_new_form() -> None:
    old = unpacked({"w": ONE, "control/w": 2 * ONE}, {"selection/loss/c0": ONE}, ema=True)
    assert old.state.ema is not None
    again = Snapshot.unpack(*old.pack())
    assert again.reached == old.reached == {"c0": (2, 4)}
    assert again.pack()[1] == old.pack()[1]
    assert again.state.section(SectionId("control"))["w"].tolist() == [2.0, 2.0]
    assert again.state.ema is not None
    np.testing.assert_array_equal(again.state.ema.views()["w"], ONE)
