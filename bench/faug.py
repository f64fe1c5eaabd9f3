"""FAug's experiment (Jeong et al. 2018, Table 1): accuracy and bits of ten devices with three scarce labels."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

from bench.cells import EVAL_PARTS, TRAIN_IMAGES, average, spread
from bench.claims import Values, percent
from bench.report import Row, Target

#: The network that accuracies are measured with; the paper's takes 100 times as long and is run for its bits only.
SMALL = "mlp"
#: Preset name of the paper's network, registered during a run of this bench, and its row.
MODEL, PAPERS = "jeong-cnn", "FL, the paper's network, 1 step"
#: Two convolutions and two dense layers as in the paper, with widths that give exactly its 1,199,648 parameters at
#: 28 pixels; the paper's widths 32, 64 and 128 assume convolutions without padding and biases.
WIDTHS, HIDDEN = [63, 71], 332
PARAMETERS = 1_199_648
DEVICES, SCARCE, IMAGES = 10, 3, 2_000
ROUNDS = 16
#: Bits per device over the whole run, and accuracy of the reference device, in the paper's Table 1.
PAPER: Mapping[str, tuple[int, float]] = {
    "FD": (102_400, 0.7524),
    "FD + FAug": (47_989_120, 0.8642),
    "FL": (1_228_439_552, 0.9060),
    "FL + FAug": (1_276_326_272, 0.9259),
}
METHODS: Mapping[str, Values] = {
    "FD": {"method": "fd"},
    "FD + FAug": {"method": "fd", "augment": "faug"},
    "FL": {"method": "fedavg"},
    "FL + FAug": {"method": "fedavg", "augment": "faug"},
}


@dataclass(frozen=True)
class PaperRun:
    """Result of a run.

    Attributes
    ----------
    accuracy : float or None
        Mean over the devices, each on its own test images, with all labels equally frequent.
    bits : float
        Bits per device over the run, up and down, including control messages.
    seeds, filled : float
        Mean number of images that a device sent as seeds and that it generated.
    leakage : tuple of float
        Mean privacy leakage to the server, and between devices.
    seconds : float
        Wall time.
    """

    accuracy: float | None
    bits: float
    seeds: float = 0.0
    filled: float = 0.0
    leakage: tuple[float, float] = (0.0, 0.0)
    seconds: float = 0.0


def run_paper(
    data: str, label: str, seed: int, root: Path, *, rounds: int, steps: int, gan_steps: int
) -> PaperRun:
    """Run one method on the paper's set-up; `steps` are local steps per round (250 in the paper)."""
    import torch

    from bench.local_tree import LocalClient, LocalTree
    from espalier.data.spec import sharing_sources
    from espalier.methods.run_config import with_defaults
    from espalier.models import presets

    torch.set_num_threads(1)
    shares = TRAIN_IMAGES[data] // IMAGES or DEVICES
    clients = [
        LocalClient(f"device-{i}", f"{data}:{i}/{shares}:iid,seed={seed}+scarce={SCARCE}", (0, 1))
        for i in range(DEVICES)
    ]
    settings: dict[str, Any] = {
        "model": MODEL if label == PAPERS else SMALL,
        "rounds": rounds,
        "rg": 1,
        "batch-size": 64,
        "local-steps": steps,
        "faug-steps": gan_steps,
        "eval-data": EVAL_PARTS[data],
        "eval-clients": True,
        "eval-every": rounds,
        "keep-checkpoints": 1,
        "min-edges": 2,
        "min-clients": DEVICES,
        "seed": seed,
        **(METHODS["FL"] if label == PAPERS else METHODS[label]),
    }
    network = presets.Preset(
        "classification", "cnn", "Jeong et al.'s size", {"widths": WIDTHS, "hidden": HIDDEN}
    )
    ram_disk = Path("/dev/shm")
    start = time.perf_counter()
    with (
        patch.dict(presets.PRESETS, {MODEL: network}),
        patch.dict(presets.MODELS, {MODEL: network.description}),
        patch.dict(os.environ, {"ESPALIER_DATA": str(root)}),
        sharing_sources(),
        tempfile.TemporaryDirectory(dir=ram_disk if os.access(ram_disk, os.W_OK) else None) as folder,
    ):
        record = LocalTree(Path(folder), clients, 2).run("faug", with_defaults(settings, {})).recorder.record
    # The last window includes evaluation, whose bytes are not the method's.
    plain = record.windows[:-1] or record.windows
    each = mean(w.links["client-edge"].up_bytes + w.links["client-edge"].down_bytes for w in plain)
    total, filling = each * rounds, record.augmentation
    if filling:
        total += filling.links["client-edge"].up_bytes + filling.links["client-edge"].down_bytes
    return PaperRun(
        accuracy=record.accuracy[-1].mean if record.accuracy else None,
        bits=8 * total / DEVICES,
        seeds=sum(filling.seeds.values()) / DEVICES if filling else 0.0,
        filled=sum(filling.filled.values()) / DEVICES if filling else 0.0,
        leakage=(_mean(filling.leakage_to_server.values()), _mean(filling.leakage_between.values()))
        if filling
        else (0.0, 0.0),
        seconds=time.perf_counter() - start,
    )


def _mean(values: Iterable[float]) -> float:
    return average(values) or 0.0


def rows(found: Mapping[str, Sequence[PaperRun]], rounds: int) -> list[Row]:
    """Return a row for each method; accuracies in per cent."""
    return [
        {
            "part": "FAug's set-up",
            "method": label,
            "seeds": len(runs),
            "clients": percent(average(r.accuracy for r in runs)),
            "clients_sd": percent(spread(r.accuracy for r in runs)),
            "bits_a_device": round(_mean(r.bits for r in runs)),
            "paper_bits": _paper_bits(label) if rounds == ROUNDS else None,
            "seconds": round(_mean(r.seconds for r in runs), 1),
            "status": "finished",
        }
        for label, runs in found.items()
    ]


def _paper_bits(label: str) -> int | None:
    """Return the paper's bits, None for methods that exchange weights with a network other than the paper's."""
    if label == PAPERS:
        return PAPER["FL"][0]
    return PAPER[label][0] if METHODS[label]["method"] == "fd" else None


def notes(found: Mapping[str, Sequence[PaperRun]], rounds: int, steps: int) -> list[str]:
    """Return notes on the set-up, the generated images and the privacy leakage."""
    paper = ", ".join(f"{label} {accuracy:.1%}" for label, (_, accuracy) in PAPER.items())
    found_notes = [
        f"FAug's set-up: {DEVICES} devices, {SCARCE} labels of 5 images each, {rounds} rounds of {steps} steps "
        f"with an {SMALL} (paper: 16 of 250, a CNN); bits are all traffic between a device and the edges, including "
        "control messages",
        f"FAug's set-up: the paper's reference device reached {paper}",
    ]
    for label, runs in found.items():
        if any(r.seeds for r in runs):
            sent, filled = (_mean(getattr(r, of) for r in runs) for of in ("seeds", "filled"))
            server, between = (_mean(r.leakage[i] for r in runs) for i in range(2))
            found_notes.append(
                f"{label}: a device sent {sent:.1f} seeds and generated {filled:.1f} images; privacy leakage "
                f"{server:.2f} to the server, {between:.2f} between devices"
            )
    return found_notes


def targets(found: Mapping[str, Sequence[PaperRun]], data: str, rounds: int) -> list[Target]:
    """Return the targets for bits and accuracy; the paper's bits apply to its images and rounds only."""
    found_targets = []
    for label, row in (("FD + FAug", "FD + FAug"), ("FL", PAPERS)):
        if row in found and rounds == ROUNDS and data != "digits":
            value, paper = _mean(r.bits for r in found[row]), PAPER[label][0]
            name = f"FAug's set-up: bits a device of {row}, within 2 % of the paper's"
            found_targets.append(Target.within(name, value, 0.98 * paper, 1.02 * paper))
    if "FD" in found and "FD + FAug" in found:
        gain = 100 * (
            _mean(r.accuracy or 0.0 for r in found["FD + FAug"])
            - _mean(r.accuracy or 0.0 for r in found["FD"])
        )
        found_targets.append(
            Target.at_least("FAug's set-up: FD + FAug over FD, points (paper: 11 to 16)", gain, 5.0)
        )
    return found_targets
