"""Decoders of tensors: layouts, payloads, codes, class tables, image-vector pairs."""

from __future__ import annotations

from random import Random
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict

from espalier.flower.arrays import array_from_numpy, numpy_view
from espalier.methods.run_config import RunConfig
from espalier.wire import control
from espalier.wire.bitpack import pack as pack_bits
from espalier.wire.bitpack import unpack as unpack_bits
from espalier.wire.class_table import ClassTable, given_arrays, given_table, merge
from espalier.wire.codec_registry import create_codec
from espalier.wire.downlink import DownlinkEncoding, read_downlink
from espalier.wire.pairs import Pairs
from espalier.wire.payload import Layout, Weights
from espalier.wire.sections import Layouts, Payload, layouts_to_proto
from espalier.wire.uplink import UplinkEncoding
from espalier_proto import espalier_pb2 as pb
from tests.fuzz.campaign import Case
from tests.fuzz.examples import LAYOUT, LAYOUTS, MODEL, RNG, SECTIONS, all_fit, content_of, fits
from tests.fuzz.mutate import mutate_bytes, mutate_proto
from tests.fuzz.mutate_arrays import mutate_array, mutate_arrays, mutate_content


def layout_case(*, whole: bool = False) -> Case:
    """Return the case of a plan's sections; `whole`: of a plan that lists none, and so sends the network alone."""
    plan = pb.RoundPlan(schema=control.SCHEMA, run="r", window=1, round=1, client="c", edge="e")
    plan.architecture.tensors.extend(LAYOUT.to_proto().tensors)
    if not whole:
        plan.sections.extend(layouts_to_proto(LAYOUTS))

    def feed(changed: pb.RoundPlan) -> Layouts:
        layouts = control.plan_sections(changed, "edge-1")
        if sum(layout.nbytes for layout in layouts.values()) <= 2**20:  # one whose bytes would really be sent
            Payload.blank(layouts).views()
        return layouts

    def unsound(changed: Any, layouts: Layouts) -> str:
        for section, layout in layouts.items():
            if any(len(t.shape) > 32 or not t.name for t in layout.tensors):
                return "a tensor that numpy cannot have"
            if section.key in (control.CONFIG, control.METRICS, control.REPORT) or len(str(section)) > 200:
                return f"the section {section}"
        size = sum(layout.nbytes for layout in layouts.values())
        return "" if size < 2**36 else f"a layout of {size} bytes"

    name = "all: Layout of the network" if whole else "all: Layout"
    return Case(name, lambda rng: mutate_proto(plan, rng), feed, unsound, lambda: feed(plan))


def weights_case() -> Case:
    record = Weights.pack(MODEL).to_record()

    def feed(changed: RecordDict) -> Weights:
        arrays = changed.get(control.ARRAYS)
        return Weights.from_record(arrays if isinstance(arrays, ArrayRecord) else ArrayRecord(), LAYOUT, "c0")

    def unsound(changed: RecordDict, made: Weights) -> str:
        return fits(LAYOUT, made.views())

    content = RecordDict({control.ARRAYS: record})
    return Case(
        "all: Weights", lambda rng: mutate_content(content, rng), feed, unsound, lambda: feed(content)
    )


def payload_case() -> Case:
    content = content_of(Payload.pack(SECTIONS)).content

    def feed(changed: RecordDict) -> Payload:
        return control.read_payload(Message(changed, 1, "train"), LAYOUTS, "c0")

    def unsound(changed: RecordDict, made: Payload) -> str:
        return all_fit(LAYOUTS, made.views())

    return Case(
        "all: Payload", lambda rng: mutate_content(content, rng), feed, unsound, lambda: feed(content)
    )


def view_case() -> Case:
    array = array_from_numpy(MODEL["w"])

    def unsound(changed: Any, made: np.ndarray) -> str:
        return "" if not made.dtype.hasobject and made.nbytes <= len(changed.data) else "objects, or too much"

    return Case(
        "all: numpy_view",
        lambda rng: mutate_array(array, rng),
        numpy_view,
        unsound,
        lambda: numpy_view(array),
        (ValueError,),
    )


def codec_case(**settings: Any) -> Case:
    codec = create_codec(RunConfig.from_flat(settings))
    update = {n: a for n, a in MODEL.items() if a.dtype == np.float32}
    like, rng_ = Layout.of(update), np.random.default_rng(1)
    encoding = UplinkEncoding(LAYOUTS, LAYOUTS, frozenset(), codec)
    zeros = {s: {n: np.zeros_like(a) for n, a in arrays.items()} for s, arrays in SECTIONS.items()}
    payload, _ = encoding.encode(SECTIONS, zeros, rng_)
    coded = codec.encode(update, rng_)
    record = RecordDict(dict(payload.to_records()))

    def mutant(rng: Random) -> Any:
        return mutate_content(record, rng) if rng.random() < 0.4 else mutate_arrays(dict(coded), rng)

    def feed(changed: Any) -> Any:
        if not isinstance(changed, RecordDict):
            return codec.decode(changed, like, "c0")
        got = control.read_payload(Message(changed, 1, "train"), encoding.wire, "c0")
        return encoding.decode(got, SECTIONS, "c0")

    def unsound(changed: Any, made: Any) -> str:
        # What a codec alone makes of a code is checked where it is added.
        return all_fit(LAYOUTS, made) if isinstance(changed, RecordDict) else fits(like, made, np.inf)

    return Case(
        f"edge: codec {codec.name} {settings.get('codec-keep', '')}".rstrip(),
        mutant,
        feed,
        unsound,
        lambda: (feed(coded), feed(record)),
    )


def bits_case() -> Case:
    packed = pack_bits(np.arange(13, dtype=np.uint16) * 70, 10)

    def mutant(rng: Random) -> tuple[np.ndarray, int, int]:
        data = np.frombuffer(mutate_bytes(packed.tobytes(), rng), np.uint8)
        return data, rng.choice((13, 12, 0, 10**6)), rng.choice((10, 9, 1, 24))

    def unsound(changed: Any, made: np.ndarray) -> str:
        return "" if len(made) == changed[1] and (made < 1 << changed[2]).all() else "other codes than wanted"

    def feed(changed: tuple[np.ndarray, int, int]) -> np.ndarray:
        return unpack_bits(*changed)

    return Case("edge: bitpack", mutant, feed, unsound, lambda: feed((packed, 13, 10)), (ValueError,))


def table_case() -> Case:
    soft = np.array([[0.5, 0.25, 0.25], [0, 1, 0]], np.float32)
    table = ClassTable.of("soft-label", 3, [0, 2], soft)

    def mutant(rng: Random) -> Any:
        proto, vectors = table.to_proto(), table.vectors
        if rng.random() < 0.6:
            proto = cast(pb.ClassTable, mutate_proto(proto, rng))
        else:
            vectors = mutate_arrays({"v": vectors}, rng).get("v", np.zeros((0, 3), np.float32))
        return proto, vectors

    def feed(changed: Any) -> ClassTable:
        made = ClassTable.from_proto(changed[0], changed[1], "c0").validate(
            "c0", kind="soft-label", classes=3
        )
        return merge([made, table]).without(table)

    def unsound(changed: Any, made: ClassTable) -> str:
        sums = made.vectors.sum(1)
        good = np.isfinite(made.vectors).all() and np.allclose(sums, 1, atol=1e-3) and (made.counts > 0).all()
        return "" if good else "no distribution"

    return Case("edge: ClassTable", mutant, feed, unsound, lambda: feed((table.to_proto(), table.vectors)))


def given_case() -> Case:
    table = ClassTable.of("prototype", 3, [0, 2], RNG.normal(size=(2, 4)).astype(np.float32))
    arrays = given_arrays(table, 3)
    zeros = {n: np.zeros_like(a) for n, a in arrays.items()}  # nothing was given yet

    def feed(changed: dict[str, np.ndarray]) -> ClassTable | None:
        return given_table(changed, "prototype", 3, "edge-1")

    def unsound(changed: Any, made: ClassTable | None) -> str:
        good = made is None or (np.isfinite(made.vectors).all() and np.isfinite(made.counts).all())
        return "" if good else "a table that is not finite"

    return Case(
        "client: class table",
        lambda rng: mutate_arrays(arrays, rng),
        feed,
        unsound,
        lambda: [feed(a) for a in (arrays, {}, zeros)],
    )


def pairs_case() -> Case:
    images = RNG.uniform(-1, 1, size=(2, 1, 8, 8)).astype(np.float32)
    arrays = Pairs(images, RNG.normal(size=(2, 4)).astype(np.float32)).arrays()

    def feed(changed: dict[str, np.ndarray]) -> Pairs | None:
        return Pairs.received(changed, (1, 8, 8), "edge-1")

    def unsound(changed: Any, made: Pairs | None) -> str:
        if made is None:
            return ""
        floats = made.floats()
        good = (
            floats.shape[1:] == (1, 8, 8) and np.isfinite(floats).all() and len(floats) == len(made.centroids)
        )
        return "" if good else "pairs that do not fit"

    return Case(
        "client: image-vector pairs",
        lambda rng: mutate_arrays(arrays, rng),
        feed,
        unsound,
        lambda: [feed(a) for a in (arrays, {})],
    )


def sent_case(downlink: str) -> Case:
    """Return the case of what a server sends in half precision."""
    settings = RunConfig(downlink=downlink)
    plan = pb.RoundPlan(schema=control.SCHEMA, sections=layouts_to_proto(LAYOUTS))
    plan.architecture.tensors.extend(LAYOUT.to_proto().tensors)
    encoding = DownlinkEncoding(LAYOUTS, plan.architecture, settings)
    payload, _ = encoding.encode(Payload.pack(SECTIONS))
    content = content_of(payload).content

    def feed(changed: RecordDict) -> Payload:
        return read_downlink(Message(changed, 1, "train"), plan, settings, "edge-1")

    def unsound(changed: RecordDict, made: Payload) -> str:
        return all_fit(LAYOUTS, made.views())

    return Case(
        f"edge, client: tensors sent as {downlink}",
        lambda rng: mutate_content(content, rng),
        feed,
        unsound,
        lambda: feed(content),
    )
