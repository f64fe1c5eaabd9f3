"""What a client is given of a server's tensors, and what its answers may hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.errors import WireError
from espalier.methods.base import ServerState
from espalier.methods.registry import create_method
from espalier.methods.run_config import RunConfig
from espalier.methods.views import (
    INQUIRIES,
    SAMPLES,
    STATISTICS,
    answer_layouts,
    buffers_of,
    slice_view,
    whole_view,
)
from espalier.wire.payload import Layout, TensorSpec
from espalier.wire.sections import GRADIENT, MODEL, Layouts, Payload, SectionId, layouts_to_proto
from espalier_proto import espalier_pb2 as pb

NETWORK: dict[str, np.ndarray] = {
    "conv.weight": np.arange(4 * 3 * 2 * 2, dtype=np.float32).reshape(4, 3, 2, 2),
    "bn.weight": np.arange(4, dtype=np.float32),
    "bn.bias": np.arange(4, dtype=np.float32) + 10,
    "bn.running_mean": np.arange(4, dtype=np.float32) + 20,
    "bn.num_batches_tracked": np.array(7),
}
DYN, CLUSTER = SectionId("dyn"), SectionId("cluster", "1")
SECTIONS: dict[SectionId, dict[str, np.ndarray]] = {
    DYN: {"conv.weight": np.ones((4, 3, 2, 2), np.float32)},
    CLUSTER: {"bn.bias": np.arange(4, dtype=np.float32) + 30},
}
BUFFERS = {"bn.running_mean", "bn.num_batches_tracked"}


def spec(tensors: dict[str, np.ndarray]) -> pb.ArchitectureSpec:
    made = pb.ArchitectureSpec(family="cnn", tensors=Layout.of(tensors).to_proto().tensors)
    for tensor in made.tensors:
        tensor.buffer = tensor.name in BUFFERS
    return made


SERVER = ServerState(spec(NETWORK), Payload.pack({MODEL: NETWORK, **SECTIONS}))


def method(name: str) -> Any:
    return create_method(RunConfig.from_flat({"method": name, "model": "cnn"}))


def test_the_whole_is_everything_clients_may_see() -> None:
    found = whole_view(SERVER, method("fedavg").server_sections)
    assert found.payload is SERVER.payload
    assert found.returns == tuple(NETWORK)
    assert found.sources == {}
    # FedDyn's h stays with the servers; the rest comes along in its order.
    hidden = whole_view(SERVER, method("feddyn").server_sections)
    assert list(hidden.payload) == [MODEL, CLUSTER]
    assert hidden.returns == tuple(NETWORK)
    for section, weights in hidden.payload.items():
        assert weights is SERVER.payload[section]


@given(st.integers(1, 4), st.integers(1, 3))
def test_a_narrow_network_is_the_leading_slices(width: int, depth: int) -> None:
    own = {
        "conv.weight": NETWORK["conv.weight"][:width, :depth],
        "bn.weight": NETWORK["bn.weight"][:width],
        "bn.num_batches_tracked": NETWORK["bn.num_batches_tracked"],
    }
    found = slice_view(pb.View(architecture=spec(own)), SERVER, "cloud")
    assert found.payload.layouts == {MODEL: Layout.of(own)}
    for name, view in found.payload[MODEL].views().items():
        np.testing.assert_array_equal(view, own[name])
        assert not np.shares_memory(view, SERVER.tensors[name])
    assert found.returns == tuple(own)


def test_a_view_renames_and_says_what_comes_back() -> None:
    own = {"bn.bias": np.zeros(2, np.float32), "bn.weight": np.zeros(4, np.float32)}
    view = pb.View(
        architecture=spec(own),
        sections=layouts_to_proto({MODEL: Layout.of(own), DYN: Layout.of(SECTIONS[DYN])}),
        sources={"bn.bias": pb.SectionName(name="cluster", member="1")},
        returns=["bn.bias"],
    )
    found = slice_view(view, SERVER, "cloud")
    assert {n: a.tolist() for n, a in found.payload[MODEL].views().items()} == {
        "bn.bias": [30, 31],
        "bn.weight": [0, 1, 2, 3],
    }
    assert found.payload[DYN].layout.names == ("conv.weight",)
    assert found.returns == ("bn.bias",)
    # What the client trained is sorted into the server's sections again.
    h = SECTIONS[DYN]["conv.weight"]
    assert found.at_server({MODEL: own, DYN: {"conv.weight": h}}) == {
        CLUSTER: {"bn.bias": own["bn.bias"]},
        MODEL: {"bn.weight": own["bn.weight"]},
        DYN: {"conv.weight": h},
    }


def test_what_is_not_sent_does_not_come_back_by_itself() -> None:
    """Personal layers: the network has them, the view does not."""
    view = pb.View(
        architecture=spec(NETWORK),
        sections=layouts_to_proto({MODEL: Layout.of({"bn.weight": NETWORK["bn.weight"]})}),
    )
    found = slice_view(view, SERVER, "cloud")
    assert found.returns == ("bn.weight",)
    assert found.payload[MODEL].layout.names == ("bn.weight",)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((5, 3, 2, 2), np.float32),
        np.zeros((4, 3), np.float32),
        np.zeros((), np.float32),
        np.zeros((4, 3, 2, 2, 1), np.float32),
    ],
)
def test_what_no_slice_gives_is_refused(array: np.ndarray) -> None:
    with pytest.raises(WireError, match=r"'cloud' refused: a view with tensor 'conv\.weight'"):
        slice_view(pb.View(architecture=spec({"conv.weight": array})), SERVER, "cloud")


def test_a_tensor_the_server_lacks_is_refused() -> None:
    for view in (
        pb.View(architecture=spec({"x": np.zeros(2, np.float32)})),
        pb.View(
            architecture=spec({"bn.bias": np.zeros(2, np.float32)}),
            sources={"bn.bias": pb.SectionName(name="x")},
        ),
    ):
        with pytest.raises(WireError, match="which is not a slice of the server"):
            slice_view(view, SERVER, "cloud")


def test_buffers_are_what_is_not_trained() -> None:
    assert buffers_of(SERVER.architecture) == BUFFERS


# --- answers ---------------------------------------------------------------------------------------------


def layouts(kind: str, architecture: pb.ArchitectureSpec, population: int = 4, **flat: Any) -> Layouts:
    return answer_layouts(kind, architecture, RunConfig.from_flat(flat), population)


def test_answers_that_are_numbers_hold_no_tensors() -> None:
    for kind in ("loss", "batch-loss", "accuracy"):
        assert layouts(kind, SERVER.architecture) == {}


def test_a_gradient_is_of_trained_tensors() -> None:
    found = layouts("gradient", SERVER.architecture)
    assert list(found) == [GRADIENT]
    assert found[GRADIENT].names == ("conv.weight", "bn.weight", "bn.bias")
    assert found[GRADIENT].tensors[0].shape == (4, 3, 2, 2)


def test_statistics_are_of_every_normalisation() -> None:
    found = layouts("statistics", SERVER.architecture)
    assert found[STATISTICS].tensors == (
        TensorSpec("bn.mean", "float32", (4,)),
        TensorSpec("bn.var", "float32", (4,)),
        TensorSpec("bn.count", "float32", ()),
    )


@pytest.mark.parametrize(("wanted", "population", "each"), [(10, 4, 3), (8, 4, 2), (2, 9, 1), (7, 0, 7)])
def test_clients_share_the_samples_of_an_evaluation(wanted: int, population: int, each: int) -> None:
    unet = pb.ArchitectureSpec(family="unet")
    unet.config.update({"sample_size": 16, "in_channels": 3})
    found = layouts("samples", unet, population, **{"eval-samples": wanted})
    assert found[SAMPLES].tensors == (TensorSpec("images", "uint8", (each, 3, 16, 16)),)


def test_what_cannot_be_asked() -> None:
    with pytest.raises(ValueError, match="samples of a cnn network"):
        layouts("samples", SERVER.architecture)
    with pytest.raises(ValueError, match="'weather' is unknown; known are " + ", ".join(INQUIRIES)):
        layouts("weather", SERVER.architecture)
