"""A reply on the link: the client codes, the edge decodes, and both read the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.errors import WireError
from espalier.methods.run_config import RunConfig
from espalier.wire.codec import Codec
from espalier.wire.codec_registry import create_codec
from espalier.wire.payload import Layout, TensorSpec
from espalier.wire.sections import GRADIENT, MODEL, Payload, SectionId, Sections
from espalier.wire.uplink import CODE, UplinkEncoding

Nested = dict[SectionId, dict[str, np.ndarray]]
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
WIDTH, HEAD, CONTROL = SectionId("width", "0.5"), SectionId("head"), SectionId("control")
SENT: Nested = {
    MODEL: {
        "conv.weight": RNG.normal(size=(3, 2, 2, 2)).astype(np.float32),
        "bn.running_mean": RNG.normal(size=3).astype(np.float32),
        "bn.num_batches_tracked": np.array(4),
    },
    WIDTH: {"bn.running_mean": RNG.normal(size=2).astype(np.float32)},
    HEAD: {"weight": RNG.normal(size=(4, 3)).astype(np.float32)},
    CONTROL: {"conv.weight": RNG.normal(size=(3, 2, 2, 2)).astype(np.float32)},
}


def codec_of(name: str) -> Codec | None:
    return None if name == "none" else create_codec(RunConfig(codec=name, **CODECS[name]))


def moved(seed: int) -> Nested:
    """Return a reply: all but the control variate, and a gradient that was never sent."""
    rng = np.random.default_rng(seed)
    reply = {
        section: {
            n: (a + 0.1 * rng.normal(size=a.shape)).astype(a.dtype) if a.dtype.kind == "f" else a + 3
            for n, a in arrays.items()
        }
        for section, arrays in SENT.items()
        if section != CONTROL
    }
    return reply | {GRADIENT: {"conv.weight": rng.normal(size=(3, 2, 2, 2)).astype(np.float32)}}


def layouts_of(sections: Sections) -> dict[SectionId, Layout]:
    return {section: Layout.of(arrays) for section, arrays in sections.items()}


def encoding_of(name: str, reply: Sections, sent: Sections = SENT) -> UplinkEncoding:
    """Make an encoding anew, as each end does for itself."""
    return UplinkEncoding(layouts_of(reply), layouts_of(sent), BUFFERS, codec_of(name))


def flat(sections: Sections) -> dict[tuple[SectionId, str], np.ndarray]:
    return {(section, n): a for section, arrays in sections.items() for n, a in arrays.items()}


@pytest.mark.parametrize("name", CODECS)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_edge_reads_what_the_client_believes_it_reads(name: str, seed: int) -> None:
    reply = moved(seed)
    payload, believed = encoding_of(name, reply).encode(reply, SENT, np.random.default_rng(seed))
    alone = encoding_of(name, reply).payload(reply, SENT, np.random.default_rng(seed))
    for section, weights in payload.items():
        assert all(np.array_equal(alone[section].buffers[kind], b) for kind, b in weights.buffers.items())
    edge = encoding_of(name, reply)
    arrived = Payload.read(payload.to_records(), edge.wire, "c")
    decoded = flat(edge.decode(arrived, SENT, "c"))
    assert list(decoded) == list(flat(believed)) == list(flat(reply)) == edge.keys
    for tensor, array in decoded.items():
        np.testing.assert_array_equal(array, flat(believed)[tensor], err_msg=str(tensor))
        assert (array.dtype, array.shape) == (flat(reply)[tensor].dtype, flat(reply)[tensor].shape)
    for tensor in set(flat(reply)) - {(MODEL, "conv.weight"), (HEAD, "weight")}:
        np.testing.assert_array_equal(decoded[tensor], flat(reply)[tensor], err_msg=str(tensor))
    whole = edge.whole(arrived, SENT, "c")
    assert whole.layouts == layouts_of(reply)
    for tensor, array in flat(whole.views()).items():
        np.testing.assert_array_equal(array, decoded[tensor], err_msg=str(tensor))


@pytest.mark.parametrize("name", sorted(set(CODECS) - {"none"}))
def test_only_trained_tensors_that_the_client_was_sent_are_coded(name: str) -> None:
    encoding = encoding_of(name, moved(0))
    assert encoding.coded.names == ("conv.weight", "weight")
    assert {section: layout.names for section, layout in encoding.plain.items()} == {
        MODEL: ("bn.running_mean", "bn.num_batches_tracked"),
        WIDTH: ("bn.running_mean",),
        GRADIENT: ("conv.weight",),
    }
    assert list(encoding.wire) == [*encoding.plain, CODE]
    payload, _ = encoding.encode(moved(0), SENT, np.random.default_rng(0))
    views = payload.views()
    for section, layout in encoding.plain.items():
        for tensor in layout.names:
            np.testing.assert_array_equal(views[section][tensor], moved(0)[section][tensor])


def test_tensors_of_one_name_in_two_sections_are_coded_apart() -> None:
    one, two = SectionId("cluster", "1"), SectionId("cluster", "2")
    sent = {s: {"w": np.zeros(3, np.float32)} for s in (one, two)}
    reply = {one: {"w": np.full(3, 1, np.float32)}, two: {"w": np.full(3, 2, np.float32)}}
    encoding = encoding_of("fp16", reply, sent)
    payload, _ = encoding.encode(reply, sent, np.random.default_rng(0))
    assert list(payload) == [CODE]
    decoded = encoding_of("fp16", reply, sent).decode(payload, sent, "c")
    assert {s: a["w"].tolist() for s, a in decoded.items()} == {one: [1, 1, 1], two: [2, 2, 2]}


def test_half_precision_by_hand() -> None:
    """The difference is rounded, not the tensor: 1000.0001 would be 1000 in half precision."""
    sent = {MODEL: {"w": np.array([1000.0, 2.0], np.float32)}}
    reply = {MODEL: {"w": np.array([1000.25, 2.0 + 2**-12], np.float32)}}
    payload, believed = encoding_of("fp16", reply, sent).encode(reply, sent, np.random.default_rng(0))
    assert payload.layouts == {CODE: Layout((TensorSpec("w", "float16", (2,)),))}
    np.testing.assert_array_equal(payload.views()[CODE]["w"], np.array([0.25, 2**-12], np.float16))
    np.testing.assert_array_equal(believed[MODEL]["w"], reply[MODEL]["w"])


def test_top_k_sends_the_largest_differences() -> None:
    sent = {MODEL: {"w": np.zeros(10, np.float32)}}
    reply = {MODEL: {"w": np.arange(10, dtype=np.float32)}}
    _, believed = encoding_of("top-k", reply, sent).encode(reply, sent, np.random.default_rng(0))
    np.testing.assert_array_equal(believed[MODEL]["w"], [0, 0, 0, 0, 0, 0, 0, 7, 8, 9])


@pytest.mark.parametrize("changed", [np.zeros((2, 2), np.float32), np.zeros(4)])
def test_what_was_sent_in_another_shape_or_dtype_travels_as_it_is(changed: np.ndarray) -> None:
    """There is no difference to take, and numpy would broadcast one."""
    before = np.ones((2, 2), np.float32) if changed.ndim == 1 else np.ones((1, 1), np.float32)
    sent, reply = {MODEL: {"w": before}}, {MODEL: {"w": changed}}
    encoding = encoding_of("fp16", reply, sent)
    assert encoding.coded.names == ()
    payload, believed = encoding.encode(reply, sent, np.random.default_rng(0))
    assert list(payload) == [MODEL]
    np.testing.assert_array_equal(believed[MODEL]["w"], changed)
    np.testing.assert_array_equal(encoding.decode(payload, sent, "c")[MODEL]["w"], changed)


def test_without_a_codec_the_reply_is_itself() -> None:
    reply = moved(1)
    encoding = encoding_of("none", reply)
    payload, believed = encoding.encode(reply, SENT, np.random.default_rng(0))
    assert encoding.wire == layouts_of(reply)
    for tensor, array in flat(encoding.decode(payload, SENT, "c")).items():
        np.testing.assert_array_equal(array, flat(reply)[tensor])
        np.testing.assert_array_equal(flat(believed)[tensor], flat(reply)[tensor])


@pytest.mark.parametrize("name", ["qsgd", "top-k"])
def test_a_code_that_makes_no_sense_names_its_sender(name: str) -> None:
    reply = moved(2)
    encoding = encoding_of(name, reply)
    payload, _ = encoding.encode(reply, SENT, np.random.default_rng(0))
    broken = {s: {n: a.copy() for n, a in arrays.items()} for s, arrays in payload.views().items()}
    for array in broken[CODE].values():
        if array.dtype.kind in "iu":
            array[...] = np.iinfo(array.dtype).max
    with pytest.raises(WireError, match="'c' refused"):
        encoding.decode(Payload.fill(encoding.wire, broken), SENT, "c")
