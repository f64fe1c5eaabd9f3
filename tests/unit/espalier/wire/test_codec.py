from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from espalier.errors import ConfigError, WireError
from espalier.methods.run_config import RunConfig
from espalier.wire.bitpack import MAX_WIDTH, pack, packed_size, unpack
from espalier.wire.codec import BFloat16, Codec, CodecError, Float16, Whole
from espalier.wire.codec_registry import create_codec
from espalier.wire.compression import MAX_LEVELS, QSGD, TopK
from espalier.wire.payload import STORED_AS, Layout, Weights

Arrays = dict[str, np.ndarray]

CODECS: list[Codec] = [
    Whole(),
    Float16(),
    BFloat16(),
    QSGD(1),
    QSGD(7),
    QSGD(10, per_tensor=True),
    QSGD(MAX_LEVELS),
    TopK(0.01),
    TopK(0.05),
    TopK(1.0),
]
by_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)

UPDATES = st.dictionaries(
    st.text("abc./", min_size=1, max_size=6),
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6),
        elements={
            "allow_nan": False,
            "allow_infinity": False,
            "min_value": -(2.0**50),
            "max_value": 2.0**50,  # so that a norm, too, stays below what a payload may hold
        },
    ),
    max_size=4,
)


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def there_and_back(codec: Codec, arrays: Arrays, seed: int = 0) -> Arrays:
    return codec.decode(codec.encode(arrays, rng(seed)), Layout.of(arrays), "me")


def gaussian(size: int, seed: int = 3) -> np.ndarray:
    return rng(seed).standard_normal(size).astype(np.float32)


# --- all codecs ------------------------------------------------------------------------------------


@by_codec
@given(arrays=UPDATES)
@example(arrays={})
@example(arrays={"a": np.zeros(0, np.float32)})
@example(arrays={"a": np.array(2.0, np.float32), "b": np.zeros((2, 3), np.float32)})
def test_decoded_updates_have_the_shapes_of_the_layout(codec: Codec, arrays: Arrays) -> None:
    coded, layout = codec.encode(arrays, rng()), codec.layout(Layout.of(arrays))
    assert {n: (str(a.dtype), a.shape) for n, a in coded.items()} == {
        t.name: (str(STORED_AS[t.dtype]), t.shape) for t in layout.tensors
    }
    # What crosses the link passes the receiver's check of payloads, too.
    payload = Weights.fill(layout, coded)
    received = Weights.from_record(payload.to_record(), layout, "me").views()
    decoded = codec.decode(received, Layout.of(arrays), "me")
    assert list(decoded) == list(arrays)
    into = {n: np.full_like(a, 7) for n, a in arrays.items()}
    again = codec.decode(received, Layout.of(arrays), "me", into)
    for name, array in decoded.items():
        assert again[name] is into[name]
        np.testing.assert_array_equal(again[name], array)
        assert not any(np.shares_memory(array, came) for came in received.values())
    for name, array in decoded.items():
        assert isinstance(array, np.ndarray)
        assert array.dtype == np.float32
        assert array.shape == arrays[name].shape
        assert np.isfinite(array).all()
        assert not (array * np.sign(arrays[name]) < 0).any()  # no codec turns a sign


@by_codec
def test_the_same_generator_gives_the_same_bytes(codec: Codec) -> None:
    arrays = {"a": gaussian(500).reshape(20, 25), "b": gaussian(3)}
    one, two = codec.encode(arrays, rng(5)), codec.encode(arrays, rng(5))
    assert {n: a.tobytes() for n, a in one.items()} == {n: a.tobytes() for n, a in two.items()}


@by_codec
def test_order_in_memory_does_not_matter(codec: Codec) -> None:
    array = gaussian(60).reshape(6, 10)
    one = there_and_back(codec, {"a": array})
    two = there_and_back(codec, {"a": np.asfortranarray(array)})
    np.testing.assert_array_equal(one["a"], two["a"])


@by_codec
def test_codes_are_written_in_place_tensor_by_tensor(codec: Codec) -> None:
    arrays = {"a": gaussian(60).reshape(6, 10), "b": gaussian(7), "c": gaussian(1)}
    expected = codec.encode(arrays, rng())
    room = Weights.blank(codec.layout(Layout.of(arrays)))
    into = room.views()
    found = codec.encode(arrays, rng(), into)
    for name, array in expected.items():
        np.testing.assert_array_equal(into[name], array)
        assert found[name] is into[name]
    # What will be sent is what was written.
    sent = room.frozen()
    assert sent.record is not None
    back = Weights.from_record(sent.record, sent.layout, "x").views()
    assert all(np.array_equal(back[n], a) for n, a in expected.items())
    assert not any(buffer.flags.writeable for buffer in sent.buffers.values())
    if codec.by_tensor:
        for name, array in arrays.items():
            np.testing.assert_array_equal(codec.encode({name: array}, rng())[name], expected[name])


@by_codec
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_diverged_update_is_not_sent(codec: Codec, bad: float) -> None:
    with pytest.raises(CodecError, match=r"'conv\.w' holds a value that is not finite.*learning-rate"):
        codec.encode({"b": f32(1), "conv.w": f32(0, bad, 1)}, rng())


@by_codec
def test_only_float32_is_coded(codec: Codec) -> None:
    with pytest.raises(ValueError, match="'n' of an update is int64"):
        codec.encode({"n": np.array([3])}, rng())


@by_codec
def test_arrays_of_another_layout_are_refused(codec: Codec) -> None:
    arrays = {"a": gaussian(90).reshape(9, 10), "b": gaussian(7)}
    coded, layout = codec.encode(arrays, rng()), Layout.of(arrays)
    first = next(iter(coded))
    faults: list[tuple[Arrays, str]] = [
        ({n: a for n, a in coded.items() if n != first}, "missing"),
        ({**coded, "more": f32(1)}, "'more' is superfluous"),
        ({**coded, first: coded[first].reshape(-1)[:-1]}, "expected"),
        ({**coded, first: coded[first].astype(np.float64)}, "float64"),
    ]
    for broken, fault in faults:
        with pytest.raises(WireError, match=rf"'kitchen' refused: .*{fault}"):
            codec.decode(broken, layout, "kitchen")


@pytest.mark.parametrize("codec", [c for c in CODECS if c.name != "qsgd"], ids=lambda c: c.name)
def test_numbers_that_are_not_finite_are_refused(codec: Codec) -> None:
    arrays = {"a": gaussian(90)}
    coded = {n: a.copy() for n, a in codec.encode(arrays, rng()).items()}
    first = next(iter(coded.values()))
    first[0] = 0xFF80 if codec.name == "bf16" else -np.inf
    with pytest.raises(WireError, match=r"'kitchen' refused: .* not finite"):
        codec.decode(coded, Layout.of(arrays), "kitchen")


# --- half precision --------------------------------------------------------------------------------


def test_whole_numbers_are_kept_as_they_are() -> None:
    arrays = {"a": gaussian(50)}
    np.testing.assert_array_equal(there_and_back(Whole(), arrays)["a"], arrays["a"])


def test_float16_rounds_to_nearest_and_clips() -> None:
    # Around 1 the spacing is 2^-10: a tie goes to the even neighbour.
    x = f32(1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 + 2**-20, 65504, 65519, 65521, -1e30, 1e-8)
    expected = f32(1, 1 + 2**-9, 1 + 2**-10, 65504, 65504, 65504, -65504, 0)
    np.testing.assert_array_equal(there_and_back(Float16(), {"a": x})["a"], expected)


def test_bfloat16_rounds_to_nearest_and_clips() -> None:
    largest = 2.0**127 * (2 - 2**-7)
    x = f32(1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, largest, 3.4028e38, -3.4e38, 1e-30)
    expected = f32(1, 1 + 2**-6, 1 + 2**-7, largest, largest, -largest)
    decoded = there_and_back(BFloat16(), {"a": x})["a"]
    np.testing.assert_array_equal(decoded[:6], expected)
    assert decoded[6] == pytest.approx(1e-30, rel=2**-8)


@given(hnp.arrays(np.float32, 40, elements={"allow_nan": False, "allow_infinity": False}))
def test_bfloat16_is_torchs(x: np.ndarray) -> None:
    theirs = torch.from_numpy(x).to(torch.bfloat16)
    finite = torch.isfinite(theirs).numpy()
    ours = BFloat16().encode({"a": x}, rng())["a"]
    np.testing.assert_array_equal(ours[finite], theirs.view(torch.uint16).numpy()[finite])


@pytest.mark.parametrize(("codec", "error"), [(Float16(), 2.0**-11), (BFloat16(), 2.0**-8)])
def test_half_the_bytes_and_a_small_error(codec: Codec, error: float) -> None:
    arrays = {"a": gaussian(1000)}
    assert codec.layout(Layout.of(arrays)).nbytes == 2000
    decoded = there_and_back(codec, arrays)["a"]
    assert (np.abs(decoded - arrays["a"]) <= error * np.abs(arrays["a"])).all()


# --- packing ---------------------------------------------------------------------------------------


def bits_one_by_one(packed: np.ndarray, count: int, width: int) -> list[int]:
    """Read codes off the bit string of the buffer as one long number: no shift or mask in common."""
    text = f"{int.from_bytes(packed.tobytes(), 'big'):0{8 * len(packed)}b}" if len(packed) else ""
    return [int(text[i * width : (i + 1) * width], 2) for i in range(count)]


@given(st.data())
def test_packing_agrees_with_the_bit_string(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, MAX_WIDTH))
    codes = data.draw(st.lists(st.integers(0, 2**width - 1), max_size=40))
    packed = pack(np.array(codes, np.uint32), width)
    assert len(packed) == math.ceil(len(codes) * width / 8)
    assert bits_one_by_one(packed, len(codes), width) == codes
    assert unpack(packed, len(codes), width).tolist() == codes


@pytest.mark.parametrize("width", [1, 3, 4, 5, 11, 24])
def test_packing_goes_on_beyond_a_block(width: int) -> None:
    codes = rng(width).integers(0, 2**width, 300_001, dtype=np.uint32)
    packed = pack(codes, width)
    np.testing.assert_array_equal(unpack(packed, len(codes), width), codes)
    bits = np.unpackbits(packed)[: len(codes) * width].reshape(len(codes), width)
    np.testing.assert_array_equal(bits @ (1 << np.arange(width)[::-1]), codes)


def test_codes_of_a_byte_or_half_a_byte_are_its_digits() -> None:
    codes = np.arange(16, dtype=np.uint8)
    assert pack(codes, 8).tobytes() == codes.tobytes()
    assert pack(codes, 4).tobytes().hex() == "0123456789abcdef"


def test_packed_codes_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 bytes for 5 codes of 4 bits"):
        unpack(np.zeros(2, np.uint8), 5, 4)
    with pytest.raises(ValueError, match="after the last code"):
        unpack(np.array([0, 0, 0x08], np.uint8), 5, 4)


# --- QSGD ------------------------------------------------------------------------------------------


def draws(x: np.ndarray, levels: int, count: int, seed: int = 11) -> np.ndarray:
    """Return `count` independent codings of x, shape (count, d)."""
    codec, generator, like = QSGD(levels), rng(seed), Layout.of({"x": x})
    return np.stack([codec.decode(codec.encode({"x": x}, generator), like, "me")["x"] for _ in range(count)])


def rounding_variance(x: np.ndarray, levels: int) -> np.ndarray:
    """Variance per coordinate of ‖x‖/s · (⌊a⌋ + Bernoulli(a − ⌊a⌋)), from the definition."""
    norm = np.linalg.norm(x.astype(np.float64))
    up = np.mod(levels * np.abs(x.astype(np.float64)) / norm, 1.0)
    variance: np.ndarray = (norm / levels) ** 2 * up * (1 - up)
    return variance


def test_numbers_on_levels_are_kept_bit_by_bit() -> None:
    """2² + 3² + 6² = 7²: with s = 7 all three lie on a level."""
    codec = QSGD(7)
    coded = codec.encode({"a": f32(2, -3), "b": f32(6)}, rng())
    assert coded[QSGD.NORMS].tolist() == [7.0]
    assert coded[QSGD.CODES].tobytes().hex() == "2b60"  # +2, -(8+3), +6, four spare bits
    for seed in range(20):
        decoded = there_and_back(codec, {"a": f32(2, -3), "b": f32(6)}, seed)
        np.testing.assert_array_equal(decoded["a"], f32(2, -3))
        np.testing.assert_array_equal(decoded["b"], f32(6))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9).filter(any))
def test_integer_vectors_of_integer_norm_are_lossless(numbers: list[int]) -> None:
    # One more number makes the norm whole: n² + ((n²−1)/2)² = ((n²+1)/2)² for odd n² = Σ x².
    square = sum(n * n for n in numbers)
    if square % 2 == 0:
        numbers, square = [*numbers, 1], square + 1
    norm = (square + 1) // 2
    x = f32(*numbers, (square - 1) // 2)
    np.testing.assert_array_equal(there_and_back(QSGD(norm), {"x": x})["x"], x)


def test_no_bias_over_4000_draws() -> None:
    x = f32(0.9, -0.4, 0.25, 0.1, -0.05, 0.02, 1.3, -0.7, 0.0, 0.33)
    for levels in (1, 4, 7):
        sample = draws(x, levels, 4000)
        sigma = np.sqrt(rounding_variance(x, levels) / 4000)
        assert (np.abs(sample.mean(axis=0) - x) <= 3 * sigma + 1e-7).all()


@pytest.mark.parametrize(
    ("levels", "variance", "tolerance"), [(1, 21.1, 0.8), (4, 4.7, 0.25), (64, 0.032, 0.003)]
)
def test_variance_of_785_numbers(levels: int, variance: float, tolerance: float) -> None:
    """A Gaussian x of norm 1: the variances seen with another implementation."""
    x = gaussian(785)
    x /= np.linalg.norm(x)
    sample = draws(x, levels, 400)
    errors = np.sum((sample - x) ** 2, axis=1, dtype=np.float64)
    error_of_mean = errors.std() / 20
    exact = rounding_variance(x, levels).sum()
    assert abs(errors.mean() - exact) < 4 * error_of_mean
    assert errors.mean() == pytest.approx(variance, abs=tolerance)
    assert errors.mean() <= min(785 / levels**2, math.sqrt(785) / levels)
    # Over all coordinates the squared errors of the mean, in units of their variance, add up to about 785.
    varied = rounding_variance(x, levels) > 0
    score = np.sum((sample.mean(axis=0) - x)[varied] ** 2 / rounding_variance(x, levels)[varied] * 400)
    assert abs(score - 785) < 6 * math.sqrt(2 * 785)


def test_one_level_is_ternary_and_mostly_zero() -> None:
    x = gaussian(785)
    sample = draws(x, 1, 200)
    assert set(np.unique(np.abs(sample))) == {0.0, np.float32(np.linalg.norm(x.astype(np.float64)))}
    assert np.count_nonzero(sample) / sample.size == pytest.approx(0.028, abs=0.002)


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 7, 8, 10, 64, 127, 1000, MAX_LEVELS])
@pytest.mark.parametrize("size", [0, 1, 7, 785])
def test_bits_on_the_wire_are_the_formulas(levels: int, size: int) -> None:
    bits = 32 + size * (1 + math.ceil(math.log2(levels + 1)))
    arrays = {"a": gaussian(size)}
    coded = QSGD(levels).encode(arrays, rng())
    nbytes = sum(a.nbytes for a in coded.values())
    assert 0 <= 8 * nbytes - bits < 8
    assert QSGD(levels).layout(Layout.of(arrays)).nbytes == nbytes


@given(UPDATES, st.integers(1, 300))
def test_a_decoded_number_is_a_level_beside_the_number(arrays: Arrays, levels: int) -> None:
    x = np.concatenate([f32(), *(a.reshape(-1) for a in arrays.values())]).astype(np.float64)
    decoded = there_and_back(QSGD(levels), arrays)
    y = np.concatenate([f32(), *(a.reshape(-1) for a in decoded.values())]).astype(np.float64)
    step = np.linalg.norm(x) / levels
    assert (np.abs(y - x) <= step * (1 + 1e-5)).all()
    if step > 1e-30:
        np.testing.assert_allclose(y / step, np.round(y / step), atol=1e-5 * levels)


def test_codes_are_read_by_an_independent_reader() -> None:
    arrays = {"a": gaussian(101).reshape(1, 101), "b": gaussian(20, 8)}
    for levels in (1, 5, 7, 20, 200):
        coded = QSGD(levels).encode(arrays, rng())
        width = 1 + math.ceil(math.log2(levels + 1))
        values = [
            float(coded[QSGD.NORMS][0])
            * (code % 2 ** (width - 1))
            / levels
            * (-1) ** (code // 2 ** (width - 1))
            for code in bits_one_by_one(coded[QSGD.CODES], 121, width)
        ]
        decoded = QSGD(levels).decode(coded, Layout.of(arrays), "me")
        np.testing.assert_array_equal(decoded["a"][0], np.array(values[:101], np.float32))
        np.testing.assert_array_equal(decoded["b"], np.array(values[101:], np.float32))


def test_a_norm_per_tensor_codes_every_tensor_on_its_own() -> None:
    codec = QSGD(7, per_tensor=True)
    arrays = {
        "a": f32(2, 3, 6),
        "zero": np.zeros((2, 2), np.float32),
        "b": f32(200, -300, 600),
        "none": f32(),
    }
    coded = codec.encode(arrays, rng())
    assert coded[QSGD.NORMS].tolist() == [7.0, 0.0, 700.0, 0.0]
    decoded = codec.decode(coded, Layout.of(arrays), "me")
    for name, array in arrays.items():
        np.testing.assert_array_equal(decoded[name], array)
    # With one norm for all, the small tensor lies far below the first level, 100: noise of 14 and more.
    assert (rounding_variance(np.concatenate([arrays["a"], arrays["b"]]), 7)[:3] > 14**2 - 1).all()


def test_zero_and_tiny_and_huge_updates() -> None:
    np.testing.assert_array_equal(there_and_back(QSGD(7), {"a": np.zeros(9, np.float32)})["a"], np.zeros(9))
    tiny = float(np.finfo(np.float32).smallest_subnormal)
    assert there_and_back(QSGD(3), {"a": f32(tiny, 0)})["a"].tolist() == [tiny, 0]
    assert there_and_back(QSGD(3), {"a": f32(3e38, 0)})["a"].tolist() == [np.float32(3e38), 0]
    with pytest.raises(CodecError, match="norm is more than a float32 holds"):
        QSGD(3).encode({"a": f32(3e38, 3e38)}, rng())


def test_codes_and_norms_that_no_encoder_makes_are_refused() -> None:
    codec, arrays = QSGD(5), {"a": f32(1, 2, 3)}
    good = codec.encode(arrays, rng())
    refused: list[tuple[str, np.ndarray, str]] = [
        (QSGD.NORMS, f32(np.nan), "not finite"),
        (QSGD.NORMS, f32(np.inf), "not finite"),
        (QSGD.NORMS, f32(-1), "norm of the update is negative"),
        (QSGD.NORMS, f32(1, 1), r"float32\[2\], expected float32\[1\]"),
        (QSGD.CODES, pack(np.array([1, 8 + 6, 0]), 4), "level 6, above codec-levels=5"),
        (QSGD.CODES, good[QSGD.CODES] | np.array([0, 1], np.uint8), "bits are set after the last code"),
        (QSGD.CODES, np.zeros(3, np.uint8), r"uint8\[3\], expected uint8\[2\]"),
    ]
    for name, value, fault in refused:
        with pytest.raises(WireError, match=f"'kitchen' refused: .*{fault}"):
            codec.decode({**good, name: value}, Layout.of(arrays), "kitchen")


# --- top-k -----------------------------------------------------------------------------------------


@given(
    hnp.arrays(np.float32, st.integers(0, 200), elements=st.sampled_from([-3.0, -1.0, 0.0, 1.0, 2.0, 3.0])),
    st.sampled_from([0.01, 0.05, 0.3, 0.5, 1.0]),
)
def test_the_largest_are_kept_and_of_equal_ones_the_first(x: np.ndarray, keep: float) -> None:
    codec, half = TopK(keep), len(x) // 2
    order = sorted(range(len(x)), key=lambda i: (-abs(float(x[i])), i))[: codec.selected(len(x))]
    expected = np.zeros_like(x)
    for i in order:
        expected[i] = x[i]
    decoded = there_and_back(codec, {"a": x[:half], "b": x[half:]})
    np.testing.assert_array_equal(np.concatenate([decoded["a"], decoded["b"]]), expected)


def test_how_many_elements_are_selected() -> None:
    assert [TopK(0.05).selected(d) for d in (0, 1, 29, 30, 100, 1000)] == [0, 1, 1, 2, 5, 50]
    assert TopK(0.07).selected(100) == 7  # 0.07 · 100 is 7.000000000000001
    assert TopK(1.0).selected(13) == 13


def test_top_k_over_the_whole_difference_not_per_tensor() -> None:
    decoded = there_and_back(TopK(0.5), {"small": f32(0.1, 0.2), "large": f32(-3, 2)})
    assert decoded["small"].tolist() == [0, 0]
    assert decoded["large"].tolist() == [-3, 2]


def test_positions_travel_in_the_smaller_form() -> None:
    like = {"a": gaussian(6400)}
    sparse, dense = TopK(0.01).encode(like, rng()), TopK(0.05).encode(like, rng())
    assert {n: a.nbytes for n, a in sparse.items()} == {TopK.VALUES: 4 * 64, TopK.INDICES: 4 * 64}
    assert {n: a.nbytes for n, a in dense.items()} == {TopK.VALUES: 4 * 320, TopK.MASK: 800}


def test_positions_that_do_not_fit_are_refused() -> None:
    arrays = {"a": gaussian(300)}
    like = Layout.of(arrays)

    def broken(codec: TopK, name: str, change: Callable[[np.ndarray], None], fault: str) -> None:
        coded = {n: a.copy() for n, a in codec.encode(arrays, rng()).items()}
        change(coded[name])
        with pytest.raises(WireError, match=f"'kitchen' refused: .*{fault}"):
            codec.decode(coded, like, "kitchen")

    sparse, dense = TopK(0.01), TopK(0.5)
    broken(sparse, TopK.INDICES, lambda a: np.copyto(a, a[::-1].copy()), "not rising")
    broken(sparse, TopK.INDICES, lambda a: np.copyto(a, a[0]), "repeated")
    broken(sparse, TopK.INDICES, lambda a: a.__setitem__(-1, 300), "index 300 is out of range.* 300 numbers")
    broken(dense, TopK.MASK, lambda a: a.fill(0), "the mask marks 0 elements for 150 values")
    broken(dense, TopK.MASK, lambda a: a.__setitem__(-1, a[-1] | 1), "bits after the last number")


# --- choosing --------------------------------------------------------------------------------------


def test_settings_choose_the_codec() -> None:
    assert isinstance(create_codec(RunConfig(codec="none")), Whole)
    assert isinstance(create_codec(RunConfig(codec="fp16")), Float16)
    assert isinstance(create_codec(RunConfig(codec="bf16")), BFloat16)
    whole = create_codec(RunConfig(codec="qsgd", codec_levels=10))
    assert isinstance(whole, QSGD)
    assert (whole.levels, whole.per_tensor) == (10, False)
    single = create_codec(RunConfig(codec="qsgd", codec_norm="tensor"))
    assert isinstance(single, QSGD)
    assert (single.levels, single.per_tensor) == (7, True)
    assert isinstance(create_codec(RunConfig(), "qsgd"), QSGD)
    sparse = create_codec(RunConfig(codec="top-k", codec_keep=0.25))
    assert isinstance(sparse, TopK)
    assert sparse.keep == 0.25
    assert {c.name: c.unbiased for c in CODECS} == {
        "none": True,
        "fp16": False,
        "bf16": False,
        "qsgd": True,
        "top-k": False,
    }


def test_settings_that_choose_no_codec() -> None:
    assert isinstance(create_codec(RunConfig(codec="qsgd", codec_levels=MAX_LEVELS)), QSGD)
    with pytest.raises(
        ConfigError, match="codec-levels: 8388608 is out of range; it must be at most 8388607"
    ):
        RunConfig.from_flat({"codec": "qsgd", "codec-levels": MAX_LEVELS + 1})
    with pytest.raises(ValueError, match="no codec 'auto'"):
        create_codec(RunConfig())
    for levels in (0, MAX_LEVELS + 1):
        with pytest.raises(ValueError, match="levels"):
            QSGD(levels)
    for keep in (0.0, 1.5):
        with pytest.raises(ValueError, match="share"):
            TopK(keep)


def test_packed_size_is_a_ceiling() -> None:
    assert [packed_size(n, 3) for n in (0, 1, 2, 3, 8)] == [0, 1, 1, 2, 3]
