"""Seconds of a round with FedPhD's U-Net (143 MB) as payload: our edge, stock Flower, and a plain gRPC stream.

Also windows of a whole tree of processes, and the seconds of each step that a payload passes through.
``python -m bench.payload``.
"""

from __future__ import annotations

import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Message, RecordDict
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.task_identity import TaskIdentity

from bench.edge_rounds import one_tensor, random_weights, unet_layout
from bench.overhead import Case, all_stock, at_our_edge
from bench.report import Outcome, Target, run
from bench.scale import rounds, tree
from bench.stream import streamed
from espalier.config.fields import FlatValue
from espalier.flower.payloads import pack, tree_ids, unpack
from espalier.wire.payload import Layout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABOUT = "Rounds of clients that do not train, with FedPhD's U-Net down and up: two at an edge, four in a tree"
CLIENTS = 2
EDGE, EDGE_TLS, HALF = "edge", "edge, TLS", "edge, fp16"
STOCK, LISTED = "all stock, one array", "all stock, an array a tensor"
#: Windows of one round over a stock SuperLink, two edges and four clients, each a process; and limits in seconds.
SMALL_TREE, TREE, HALF_TREE = "tree 2x2, small", "tree 2x2", "tree 2x2, fp16"
LIMITS = {SMALL_TREE: 0.3, TREE: 8.0, HALF_TREE: 4.0}
#: Logistic regression on 64 pixels has the smallest payload of all models.
SMALL: Mapping[str, FlatValue] = {"method": "fedavg", "model": "logistic"}
WHOLE: Mapping[str, FlatValue] = {"method": "fedavg", "model": "unet-paper", "sample-count": 1}
FP16: Mapping[str, FlatValue] = {"codec": "fp16", "downlink": "fp16", "edge-codec": "fp16"}
STREAM, STREAM_TLS = "plain gRPC stream", "plain gRPC stream, TLS"


def measure(tiny: bool) -> Outcome:
    """Measure all setups; with `tiny`, the edge and the stream only, with a small payload."""
    whole = one_tensor(1_000_000) if tiny else unet_layout()
    half = one_tensor(500_000, "float16") if tiny else unet_layout(dtype="float16")
    ours, streams = (2, 2) if tiny else (7, 5)
    seconds: dict[str, list[float]] = {}
    size: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="payload-") as name:
        folder = Path(name)
        case = Case(CLIENTS, whole, ours, 0, 0)
        seconds[STREAM] = streamed(folder / "stream", CLIENTS, whole.nbytes, streams, tls=False)
        seconds[STREAM_TLS] = streamed(folder / "stream-tls", CLIENTS, whole.nbytes, streams, tls=True)
        seconds[EDGE] = at_our_edge(folder / "edge", case, tls=False)[0]
        seconds[EDGE_TLS] = at_our_edge(folder / "tls", case, tls=True)[0]
        seconds[HALF] = at_our_edge(folder / "half", Case(CLIENTS, half, ours, 0, 0), tls=False)[0]
        trees = {SMALL_TREE: SMALL} | ({} if tiny else {TREE: WHOLE, HALF_TREE: {**WHOLE, **FP16}})
        for number, (kind, settings) in enumerate(trees.items()):
            windows = 3 if tiny else 6
            seconds[kind], size[kind] = in_a_tree(folder / f"tree-{number}", settings, windows)
        if not tiny:
            seconds[STOCK] = all_stock(folder / "stock", case, 2, listed=False)
            seconds[LISTED] = all_stock(folder / "listed", case, 1, listed=True)
    medians = {kind: statistics.median(found) for kind, found in seconds.items()}
    outcome = Outcome()
    for kind, found in seconds.items():
        outcome.rows.append(
            {
                "setup": kind,
                "bytes": size.get(kind, half.nbytes if kind == HALF else whole.nbytes),
                "rounds": len(found),
                "median_s": medians[kind],
                "min_s": min(found),
                "max_s": max(found),
                "stream_x": None if kind in size else medians[kind] / medians[STREAM],
                "stock_x": medians[STOCK] / medians[kind] if STOCK in medians and kind not in size else None,
            }
        )
    for step, (passes, median) in steps(whole, 1 if tiny else 3).items():
        outcome.rows.append(
            {"setup": f"step: {step}", "bytes": whole.nbytes, "rounds": passes, "median_s": median}
        )
    outcome.notes = [
        "stream_x: seconds relative to the plain stream's; stock_x: seconds of all stock with one array, divided by "
        "this setup's",
        "step: median_s is one pass over one payload on one core, rounds the number of passes in a round of two "
        "clients, over three processes",
        "tree: windows of one round over a stock SuperLink, 2 edges and 4 clients, each a process, without "
        "the sample images and the checkpoint after each; bytes are the model's in float32",
    ]
    outcome.targets = [
        Target.at_most(f"{kind}, median window, s", medians[kind], limit)
        for kind, limit in LIMITS.items()
        if kind in medians
    ]
    if not tiny:
        outcome.targets += [
            Target.at_least("stock with one array over our edge, ratio", medians[STOCK] / medians[EDGE], 3.0),
            Target.at_least(
                "stock with one array over our edge at fp16, ratio", medians[STOCK] / medians[HALF], 6.0
            ),
            Target.at_least(
                "stock with an array a tensor over our edge, ratio", medians[LISTED] / medians[EDGE], 8.0
            ),
        ]
    outcome.plots["payload"] = lambda figure: _draw(figure, medians)
    return outcome


def in_a_tree(folder: Path, settings: Mapping[str, FlatValue], windows: int) -> tuple[list[float], int]:
    """Return the seconds of windows of one round with two edges of two clients each, and the model's bytes."""
    with tree(folder, 4, 2, separate=True) as live:
        found = rounds(live, 4, 2, windows, settings)
    return found.trained, found.nbytes


def steps(layout: Layout, repeats: int) -> dict[str, tuple[int, float]]:
    """Time each step that a payload passes through.

    Returns
    -------
    dict
        Step -> (number of passes in a round of two clients, median seconds of one pass).
    """
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    weights = random_weights(layout, 0)
    record = weights.to_record()
    packed = pack(Message(RecordDict({"arrays": record}), 1, "train"))
    objects = {object_id: packed.content(object_id) for object_id in tree_ids(packed.tree)}
    requests = [PushObjectRequest(object_content=content) for content in objects.values()]
    wire = [request.SerializeToString() for request in requests]
    data = record[next(iter(record))].data
    actions: dict[str, tuple[int, Callable[[], Any]]] = {
        # Once at the edge and once at each client; the edge also hashes what it receives.
        "serialise: tensors to an Array": (3, weights.to_record),
        "hash: SHA-256 of the bytes": (5, lambda: hashlib.sha256(data).digest()),
        "copy: chunks to objects": (4, lambda: [packed.content(i) for i in objects]),
        "protobuf: objects to requests": (
            4,
            lambda: [PushObjectRequest(object_content=c) for c in objects.values()],
        ),
        "gRPC: requests to bytes": (4, lambda: [r.SerializeToString() for r in requests]),
        "gRPC: bytes to requests": (
            4,
            lambda: [PushObjectRequest.FromString(w).object_content for w in wire],
        ),
        "copy: objects to an Array": (4, lambda: unpack(packed.message_id, dict(objects))),
        "check: a finite sum": (4, weights.not_finite),
        "copy: as fast as numpy copies": (0, lambda: np.copyto(np.empty(len(data), np.uint8), 1)),
    }
    found = {}
    for step, (passes, action) in actions.items():
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            action()
            seconds.append(time.perf_counter() - began)
        found[step] = (passes, statistics.median(seconds))
    return found


def _draw(figure: Figure, medians: dict[str, float]) -> None:
    axes = figure.subplots()
    axes.barh(list(medians), list(medians.values()))
    axes.set_xscale("log")
    axes.set_xlabel("median wall time of a round, seconds")


if __name__ == "__main__":
    sys.exit(run("payload", measure, ABOUT))
