"""Parameters (M) and multiply-accumulates (G) of FedPhD's U-Net by channel ratio, against the paper's values.

At ratio 0.2 the network is sent in the wire format to a separate process, which rebuilds it without the pruning
library and returns its outputs for comparison. ``python -m bench.pruning``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from bench.report import Outcome, Row, Target, run

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

ABOUT = "FedPhD's U-Net pruned with DepGraph: parameters and multiply-accumulates by channel ratio"

#: Ratio: parameters in millions, GMACs at 32 pixels (measured with torch-pruning; 0.2 is the paper's 20.3 M, 3.4 G).
PAPER = {
    0.0: (35.7463, 6.064),
    0.05: (27.205, 4.212),
    0.10: (26.949, 4.201),
    0.20: (20.340, 3.423),
    0.25: (20.131, 3.414),
    0.30: (13.876, 2.072),
    0.40: (9.259, 1.533),
}
WIRE_RATIO = 0.2
_INPUTS, _OUTPUTS, _SPEC = "images.npy", "outputs.npy", "architecture.bin"


def measure(tiny: bool) -> Outcome:
    """Prune at every ratio of `PAPER`; with `tiny`, the preset for 8 pixels at 0.2 only."""
    import torch

    from espalier.models.pruning import prune
    from espalier.models.unet import unet
    from espalier_server.evaluation.cost import macs_and_params

    torch.manual_seed(0)
    preset, channels, size = ("unet-tiny", 1, 8) if tiny else ("unet-paper", 3, 32)
    dense = unet(preset, channels, size)
    macs_dense, params_dense = macs_and_params(dense)
    outcome, deviation = Outcome(), 0.0
    for ratio in (0.0, WIRE_RATIO) if tiny else tuple(PAPER):
        started = time.perf_counter()
        model = prune(dense, ratio) if ratio else dense
        seconds = time.perf_counter() - started
        macs, params = macs_and_params(model)
        row: Row = {
            "model": preset,
            "ratio": ratio,
            "parameters_M": params / 1e6,
            "parameters_cut_%": 100 * (1 - params / params_dense),
            "GMACs": macs / 1e9,
            "GMACs_cut_%": 100 * (1 - macs / macs_dense),
            "prune_s": seconds if ratio else None,
        }
        if not tiny:
            row["table_M"], row["table_GMACs"] = PAPER[ratio]
            deviation = max(
                deviation, abs(params / 1e6 / PAPER[ratio][0] - 1), abs(macs / 1e9 / PAPER[ratio][1] - 1)
            )
        if ratio == WIRE_RATIO:
            received = through_the_wire(model)
            outcome.targets += [
                Target.at_most(
                    "largest difference of sender and receiver", cast(float, received["difference"]), 1e-5
                ),
                Target.at_most(
                    "parameters lost on the wire", abs(params - cast(int, received["parameters"])), 0
                ),
            ]
            row |= {
                "wire_MB": cast(float, received["megabytes"]),
                "rebuild_s": cast(float, received["rebuild_s"]),
            }
            if not tiny:
                outcome.targets += [
                    Target.within("parameters at 0.2 [M]", params / 1e6, 20.2, 20.5),
                    Target.within("GMACs at 0.2", macs / 1e9, 3.40, 3.45),
                ]
        outcome.rows.append(row)
    if not tiny:
        outcome.targets += [
            Target.within("dense parameters [M]", params_dense / 1e6, 35.746, 35.747),
            Target.within("dense GMACs", macs_dense / 1e9, 6.055, 6.065),
            Target.at_most("largest relative deviation from the table", deviation, 0.002),
        ]
    outcome.plots["pruning"] = lambda figure: _plot(figure, outcome.rows)
    return outcome


def through_the_wire(model: nn.Module) -> dict[str, float | int]:
    """Send a network in the wire format to another process and compare the outputs of both.

    Returns
    -------
    dict
        ``difference`` (maximum, absolute), ``parameters`` (counted by the receiver), ``megabytes`` (payload),
        ``rebuild_s`` (the receiver's seconds from bytes to a loaded network).

    Raises
    ------
    RuntimeError
        The receiver failed, e.g. because it imported the pruning library.
    """
    import torch

    from espalier.models.architecture import describe
    from espalier.models.arrays import model_arrays
    from espalier.wire.payload import Weights

    network = cast(Any, model).eval()
    shape = (4, network.config.in_channels, network.config.sample_size, network.config.sample_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = network(images, torch.tensor([0, 10, 500, 999]), return_dict=False)[0].numpy()
    weights = Weights.pack(model_arrays(model))
    with tempfile.TemporaryDirectory(prefix="bench-pruning-") as name:
        folder = Path(name)
        (folder / _SPEC).write_bytes(describe(model).SerializeToString())
        np.save(folder / _INPUTS, images.numpy())
        for dtype, array in weights.to_record().items():
            (folder / f"{dtype}.array").write_bytes(array.data)
        done = subprocess.run(
            [sys.executable, "-m", "bench.pruning", "--receive", name],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"the receiving process failed:\n{done.stderr}")
        parameters, seconds = done.stdout.split()[-2:]
        received = np.load(folder / _OUTPUTS)
    return {
        "difference": float(np.abs(received - outputs).max()),
        "parameters": int(parameters),
        "megabytes": weights.nbytes / 1e6,
        "rebuild_s": float(seconds),
    }


def receive(folder: Path) -> None:
    """Run the receiver: rebuild the network from bytes, save its outputs, print parameters and seconds."""
    import torch
    from flwr.app import Array, ArrayRecord

    from espalier.models.architecture import build_with
    from espalier.models.arrays import to_tensor
    from espalier.models.unet import unet
    from espalier.wire.payload import STORED_AS, Layout, Weights
    from espalier_proto import espalier_pb2 as pb

    unet("unet-tiny", 1, 8)  # import libraries before the clock starts
    started = time.perf_counter()
    spec = pb.ArchitectureSpec.FromString((folder / _SPEC).read_bytes())
    layout = Layout.from_proto(spec.tensors, "bench")
    record = ArrayRecord(
        {
            dtype: Array(
                str(STORED_AS[dtype]), (n,), "numpy.ndarray", (folder / f"{dtype}.array").read_bytes()
            )
            for dtype, n in layout.lengths.items()
        }
    )
    views = Weights.from_record(record, layout, "bench").views()
    model = build_with(spec, {t.name: to_tensor(views[t.name], t.dtype) for t in layout.tensors})
    seconds = time.perf_counter() - started
    network = cast(Any, model).eval()
    with torch.no_grad():
        images = torch.from_numpy(np.load(folder / _INPUTS))
        outputs = network(images, torch.tensor([0, 10, 500, 999]), return_dict=False)[0]
    np.save(folder / _OUTPUTS, outputs.numpy())
    if "torch_pruning" in sys.modules:
        raise SystemExit("the receiver imported torch_pruning")
    print(sum(p.numel() for p in model.parameters()), seconds)


def _plot(figure: Figure, rows: list[Row]) -> None:
    axes = figure.subplots()
    ratios, parameters, macs = (
        [cast(float, row[key]) for row in rows] for key in ("ratio", "parameters_cut_%", "GMACs_cut_%")
    )
    axes.plot(ratios, parameters, "o-", label="parameters")
    axes.plot(ratios, macs, "s--", label="multiply-accumulates")
    axes.set(xlabel="channel ratio", ylabel="removed [%]", title=f"Pruning of {rows[0]['model']}")
    axes.legend()


def main() -> int:
    """Run the bench, or its receiving process."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--receive", type=Path, help=argparse.SUPPRESS)
    known, rest = parser.parse_known_args()
    if known.receive is not None:
        receive(known.receive)
        return 0
    return run("pruning", measure, ABOUT, rest)


if __name__ == "__main__":
    sys.exit(main())
