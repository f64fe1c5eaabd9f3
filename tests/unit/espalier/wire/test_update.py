"""A reply on the link: the client codes, the edge decodes, and both read the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.errors import WireError
from espalier.methods.run_config import RunConfig
from espalier.wire.codec import Codec, create_codec
from espalier.wire.payload import Layout, TensorSpec, Weights
from espalier.wire.update import CODE, UpdateForm

CODECS: dict[str, dict[str, Any]] = {
    "none": {},
    "fp16": {},
    "bf16": {},
    # Of the levels that four bits can say, 6 and 7 are none of five.
    "qsgd": {"codec_norm": "tensor", "codec_levels": 5},
    "top-k": {"codec_keep": 0.3},
}
BUFFERS = frozenset({"bn.running_mean", "bn.num_batches_tracked"})
RNG = np.random.default_rng(5)
#: What a client of FjORD would be sent: a network with statistics, those of another width, a section.
SENT: dict[str, np.ndarray] = {
    "conv.weight": RNG.normal(size=(3, 2, 2, 2)).astype(np.float32),
    "bn.running_mean": RNG.normal(size=3).astype(np.float32),
    "bn.num_batches_tracked": np.array(4),
    "p0.5/bn.running_mean": RNG.normal(size=2).astype(np.float32),
    "head/weight": RNG.normal(size=(4, 3)).astype(np.float32),
    "control/conv.weight": RNG.normal(size=(3, 2, 2, 2)).astype(np.float32),
}


def codec_of(name: str) -> Codec | None:
    return None if name == "none" else create_codec(RunConfig(codec=name, **CODECS[name]))


def moved(seed: int) -> dict[str, np.ndarray]:
    """Return a reply: all but the control variate, and a gradient that was never sent."""
    rng = np.random.default_rng(seed)
    reply = {
        n: (a + 0.1 * rng.normal(size=a.shape)).astype(a.dtype) if a.dtype.kind == "f" else a + 3
        for n, a in SENT.items()
        if not n.startswith("control/")
    }
    return reply | {"gradient/conv.weight": rng.normal(size=(3, 2, 2, 2)).astype(np.float32)}


def form_of(name: str, reply: dict[str, np.ndarray]) -> UpdateForm:
    """Make a form anew, as each end does for itself."""
    return UpdateForm(Layout.of(reply), Layout.of(SENT), BUFFERS, codec_of(name))


@pytest.mark.parametrize("name", CODECS)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_edge_reads_what_the_client_believes_it_reads(name: str, seed: int) -> None:
    reply = moved(seed)
    payload, believed = form_of(name, reply).encode(reply, SENT, np.random.default_rng(seed))
    alone = form_of(name, reply).payload(reply, SENT, np.random.default_rng(seed))
    assert all(np.array_equal(alone.buffers[kind], flat) for kind, flat in payload.buffers.items())
    edge = form_of(name, reply)
    arrived = Weights.from_record(payload.to_record(), edge.wire, "c")
    decoded = edge.decode(arrived, SENT, "c")
    assert list(decoded) == list(believed) == list(reply)
    for tensor, array in decoded.items():
        np.testing.assert_array_equal(array, believed[tensor], err_msg=tensor)
        assert (array.dtype, array.shape) == (reply[tensor].dtype, reply[tensor].shape)
    for tensor in set(reply) - {"conv.weight", "head/weight"}:
        np.testing.assert_array_equal(decoded[tensor], reply[tensor], err_msg=tensor)
    whole = edge.whole(arrived, SENT, "c")
    assert whole.layout == Layout.of(reply)
    for tensor, array in whole.views().items():
        np.testing.assert_array_equal(array, decoded[tensor], err_msg=tensor)


@pytest.mark.parametrize("name", sorted(set(CODECS) - {"none"}))
def test_only_trained_tensors_that_the_client_was_sent_are_coded(name: str) -> None:
    form = form_of(name, moved(0))
    assert form.coded.names == ("conv.weight", "head/weight")
    assert form.plain.names == (
        "bn.running_mean",
        "bn.num_batches_tracked",
        "p0.5/bn.running_mean",
        "gradient/conv.weight",
    )
    assert form.wire.names[:4] == form.plain.names
    assert all(n.startswith(CODE) for n in form.wire.names[4:])
    payload, _ = form.encode(moved(0), SENT, np.random.default_rng(0))
    views = payload.views()
    for tensor in form.plain.names:
        np.testing.assert_array_equal(views[tensor], moved(0)[tensor])
    assert "conv.weight" not in views


def test_half_precision_by_hand() -> None:
    """The difference is rounded, not the tensor: 1000.0001 would be 1000 in half precision."""
    sent = {"w": np.array([1000.0, 2.0], np.float32)}
    reply = {"w": np.array([1000.25, 2.0 + 2**-12], np.float32)}
    form = UpdateForm(Layout.of(reply), Layout.of(sent), frozenset(), codec_of("fp16"))
    payload, believed = form.encode(reply, sent, np.random.default_rng(0))
    assert payload.layout == Layout((TensorSpec("code/w", "float16", (2,)),))
    np.testing.assert_array_equal(payload.views()["code/w"], np.array([0.25, 2**-12], np.float16))
    np.testing.assert_array_equal(believed["w"], reply["w"])


def test_top_k_sends_the_largest_differences() -> None:
    sent = {"w": np.zeros(10, np.float32)}
    reply = {"w": np.arange(10, dtype=np.float32)}
    form = UpdateForm(Layout.of(reply), Layout.of(sent), frozenset(), codec_of("top-k"))
    _, believed = form.encode(reply, sent, np.random.default_rng(0))
    np.testing.assert_array_equal(believed["w"], [0, 0, 0, 0, 0, 0, 0, 7, 8, 9])


@pytest.mark.parametrize("changed", [np.zeros((2, 2), np.float32), np.zeros(4)])
def test_tensors_of_another_shape_or_dtype_are_not_coded(changed: np.ndarray) -> None:
    """There is no difference to take, and numpy would broadcast one."""
    sent = {"w": np.ones((2, 2), np.float32) if changed.ndim == 1 else np.ones((1, 1), np.float32)}
    form = UpdateForm(Layout.of({"w": changed}), Layout.of(sent), frozenset(), codec_of("fp16"))
    assert form.coded.names == ()
    payload, believed = form.encode({"w": changed}, sent, np.random.default_rng(0))
    assert payload.layout.names == ("w",)
    np.testing.assert_array_equal(believed["w"], changed)
    np.testing.assert_array_equal(form.decode(payload, sent, "c")["w"], changed)


def test_without_a_codec_the_reply_is_itself() -> None:
    reply = moved(1)
    form = form_of("none", reply)
    payload, believed = form.encode(reply, SENT, np.random.default_rng(0))
    assert form.wire == Layout.of(reply)
    for tensor, array in form.decode(payload, SENT, "c").items():
        np.testing.assert_array_equal(array, reply[tensor])
        np.testing.assert_array_equal(believed[tensor], reply[tensor])


@pytest.mark.parametrize("name", ["qsgd", "top-k"])
def test_a_code_that_makes_no_sense_names_its_sender(name: str) -> None:
    reply = moved(2)
    form = form_of(name, reply)
    payload, _ = form.encode(reply, SENT, np.random.default_rng(0))
    broken = {n: v.copy() for n, v in payload.views().items()}
    for tensor, array in broken.items():
        if tensor.startswith(CODE) and array.dtype.kind in "iu":
            array[...] = np.iinfo(array.dtype).max
    with pytest.raises(WireError, match="'c' refused"):
        form.decode(Weights.fill(form.wire, broken), SENT, "c")
