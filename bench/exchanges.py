"""What the bench of knowledge exchange runs: methods between unlike models, divisions of the data, generators."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.cells import TRAIN_IMAGES, Cell, Setup
from bench.claims import Values

#: Unlike models that a CPU can train: resnet4 takes 90 ms a step at 28 pixels, cnn4 12 ms.
FAMILY = "cnn,mlp,cnn4"
#: Models whose features have another length than those of HtFLlib's, which FedProto compares.
NARROW = ("logistic", "mlp", "cnn", "cnn-bn")
#: The network of the methods that exchange weights: all of their clients have the same.
ONE_MODEL = "cnn"
#: Settings of every run: HtFLlib's mini-batches, and steps that a CPU has time for. Bytes are those of rounds
#: without measuring, so measures must not fall on all rounds in which peers' copies are exchanged.
SETTINGS: Values = {"batch-size": 10, "local-steps": 10, "learning-rate": 0.05, "eval-every": 3}
#: Rounds of the table's runs and of those with one client, which costs a twentieth.
ROUNDS, ALONE = 8, 24
#: FedKTL's step size and clipping, its authors'. ArcFace multiplies cosines by 64, so that its gradients have norms
#: of 50 to 900: what is clipped to the default 1 learns little, and less the heavier the pairs weigh.
AUTHORS: Values = {"learning-rate": 0.01, "clip-norm": 100.0}
#: FedKTL's mu: of 0.1, 0.5, 5 and 50, the authors', the one that learnt fastest from few shots (20 clients, seed 1).
TRANSFER, HEAVY = 0.5, 50.0
AS_AUTHORS = f"FedKTL, mu={HEAVY:g}"
#: Training steps of FedKTL's generator: what `pretrain-generator` makes of MNIST in three minutes of a quiet core.
GENERATOR_STEPS = 1_250
#: Shots of the cloud-edge experiment, and FedKTL's gains there on CIFAR-100, in points (Zhang et al. 2024).
SHOTS: Mapping[int, float] = {23: 0.49, 9: 1.33, 2: 4.32}


@dataclass(frozen=True)
class Generators:
    """Folders of the generator that was trained on the data, and of one as it was drawn."""

    trained: Path
    untrained: Path


@dataclass(frozen=True)
class Regime:
    """A division of the data.

    Attributes
    ----------
    scheme : str
        As in a data SPEC, without its seed.
    fills : bool
        Whether clients lack labels, so that FAug has something to do.
    """

    scheme: str
    fills: bool


REGIMES = {
    "few-shot": Regime("iid+shots=5", fills=False),
    "Dirichlet 0.1": Regime("dirichlet=0.1", fills=True),
}


def methods(families: str, generators: Generators) -> dict[str, Values]:
    """Return the settings of every method by its label."""
    own: Values = {"families": families}
    alike = {"families": of_one_length(families)}
    transfer: Values = {**own, "method": "fedktl", "generator": f"gan:{generators.trained}"}
    transfer = {**transfer, **AUTHORS, "transfer-weight": TRANSFER}
    one: Values = {"method": "fedavg", "model": ONE_MODEL}
    return {
        "local only": {**own, "method": "fd", "soft-label-weight": 0.0},
        "local only, FedProto's models": {**alike, "method": "fd", "soft-label-weight": 0.0},
        "FD": {**own, "method": "fd"},
        "FedProto": {**alike, "method": "fedproto"},
        "co-distillation": {**own, "method": "codistillation", "peer-every": 2},
        "FD + FAug": {**own, "method": "fd", "augment": "faug"},
        "FL": one,
        "FL + FAug": {**one, "augment": "faug"},
        "FedKTL": transfer,
        "FedKTL, mu=0": {**transfer, "transfer-weight": 0.0},
        "FedKTL, untrained generator": {**transfer, "generator": f"gan:{generators.untrained}"},
    }


def of_one_length(families: str) -> str:
    """Return the models of a family whose features are as long as one another's, as FedProto needs them."""
    from espalier.models.families import family_models

    models = family_models(families)
    wide = [model for model in models if model not in NARROW]
    return ",".join(wide) or models[0]


def table_cells(
    setup: Setup, families: str, generators: Generators, more: Values, only: Collection[tuple[str, str]]
) -> dict[tuple[str, str], list[Cell]]:
    """Return the cells of the table by regime and method, those of `only`; `more` are further settings of all."""
    found = {}
    for name, regime in REGIMES.items():
        for label, settings in methods(families, generators).items():
            if (name, label) not in only or ("augment" in settings and not regime.fills):
                continue
            found[name, label] = _cells(setup, regime.scheme, {**settings, **more})
    return found


def cloud_edge_cells(
    setup: Setup, generators: Generators, more: Values, all_shots: Sequence[int]
) -> dict[tuple[int, str], list[Cell]]:
    """Return the cells of one client without a federation, by shots and method; its model is the paper's CNN."""
    known = methods("cnn4", generators)
    known[AS_AUTHORS] = {**known["FedKTL"], "transfer-weight": HEAVY}
    return {
        (shots, label): _cells(alone(setup), f"iid+shots={shots}", {"rounds": ALONE, **known[label], **more})
        for shots in all_shots
        for label in ("local only", "FedKTL, mu=0", "FedKTL", AS_AUTHORS)
    }


def alone(setup: Setup) -> Setup:
    """Return the set-up of one client, with a tenth of the data to take its shots from and to test it on."""
    images = TRAIN_IMAGES[setup.data]
    return replace(setup, clients=1, edges=1, images=images if setup.data == "digits" else images // 10)


def _cells(setup: Setup, scheme: str, settings: Values) -> list[Cell]:
    return [
        Cell(setup, scheme, {"rounds": ROUNDS, **SETTINGS, **settings}, seed)
        for seed in range(1, setup.seeds + 1)
    ]


def make_generators(
    folder: Path, data: str, root: Path, *, steps: int = GENERATOR_STEPS, minutes: float | None = None
) -> Generators:
    """Return the generators of a data set; what is in the folder from a former run is used again.

    Parameters
    ----------
    folder : Path
        Where they go, below the name of the data set.
    data : str
        A named data set.
    root : Path
        Folder of the data files.
    steps : int
        Training steps: with them the generator does not depend on how busy the machine is.
    minutes : float, optional
        How long to train, by the clock, instead.
    """
    import torch

    from espalier.data.spec import open_data
    from espalier_server.generators.gan import INDEX, save_gan
    from espalier_server.generators.networks import GanConfig, StyleGenerator, native_size
    from espalier_server.generators.pretrain import pretrain, sample_grid

    made = Generators(folder.resolve() / data, folder.resolve() / f"{data}-untrained")
    images = open_data(data, root=root)
    channels, size, _ = images.shape
    if not (made.trained / INDEX).exists():
        network, notes = pretrain(images, minutes=minutes, steps=None if minutes else steps)
        save_gan(made.trained, network, notes, sample_grid(network, seed=0))
    if not (made.untrained / INDEX).exists():
        config = GanConfig(native_size(size), channels, len(images.classes))
        drawn = StyleGenerator(config, torch.Generator().manual_seed(0)).eval()
        save_gan(made.untrained, drawn, {"data": data, "steps": 0}, sample_grid(drawn, seed=0))
    return made
