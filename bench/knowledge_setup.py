"""Methods, partitions and generators of `bench.knowledge`: knowledge exchange between heterogeneous models."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.cells import TRAIN_IMAGES, Cell, Setup
from bench.claims import Values

#: Heterogeneous models that a CPU can train: cnn4 takes 12 ms per step at 28 pixels, resnet4 90 ms.
FAMILY = "cnn,mlp,cnn4"
#: Models whose features differ in length from those of HtFLlib's models; FedProto needs equal lengths.
NARROW = ("logistic", "mlp", "cnn", "cnn-bn")
#: The model of all clients in methods that exchange weights.
ONE_MODEL = "cnn"
#: Settings of every run: HtFLlib's mini-batches, and few local steps. Bytes are counted in rounds without evaluation,
#: so evaluation must not coincide with all rounds in which peers' copies are exchanged.
SETTINGS: Values = {"batch-size": 10, "local-steps": 10, "learning-rate": 0.05, "eval-every": 3}
#: Rounds of the table's runs, and of runs with one client, which take a twentieth of the time.
ROUNDS, ROUNDS_ALONE = 8, 24
#: FedKTL's step size and clipping in its authors' code. ArcFace multiplies cosines by 64, so its gradients have norms
#: of 50 to 900: clipped to the default 1, training is slow, and slower the larger the weight of the pairs.
AUTHORS: Values = {"learning-rate": 0.01, "clip-norm": 100.0}
#: FedKTL's mu: the best of 0.1, 0.5, 5 and 50 with few shots (20 clients, seed 1), and the authors' 50.
TRANSFER, HEAVY = 0.5, 50.0
AS_AUTHORS = f"FedKTL, mu={HEAVY:g}"
#: Training steps of FedKTL's generator, as many as `pretrain-generator` runs on MNIST in three minutes on one core.
GENERATOR_STEPS = 1_250
#: Shots of the cloud-edge experiment, and the paper's gains of FedKTL on CIFAR-100, in points (Zhang et al. 2024).
SHOTS: Mapping[int, float] = {23: 0.49, 9: 1.33, 2: 4.32}


@dataclass(frozen=True)
class Generators:
    """Folders of a generator that was trained on the data, and of a randomly initialised one."""

    trained: Path
    untrained: Path


@dataclass(frozen=True)
class Regime:
    """A partition of the data.

    Attributes
    ----------
    scheme : str
        Scheme of a data SPEC, without its seed.
    fills : bool
        Whether clients lack labels, which FAug can generate.
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
    equal = {"families": of_one_length(families)}
    transfer: Values = {**own, "method": "fedktl", "generator": f"gan:{generators.trained}"}
    transfer = {**transfer, **AUTHORS, "transfer-weight": TRANSFER}
    one: Values = {"method": "fedavg", "model": ONE_MODEL}
    return {
        "local only": {**own, "method": "fd", "soft-label-weight": 0.0},
        "local only, FedProto's models": {**equal, "method": "fd", "soft-label-weight": 0.0},
        "FD": {**own, "method": "fd"},
        "FedProto": {**equal, "method": "fedproto"},
        "co-distillation": {**own, "method": "codistillation", "peer-every": 2},
        "FD + FAug": {**own, "method": "fd", "augment": "faug"},
        "FL": one,
        "FL + FAug": {**one, "augment": "faug"},
        "FedKTL": transfer,
        "FedKTL, mu=0": {**transfer, "transfer-weight": 0.0},
        "FedKTL, untrained generator": {**transfer, "generator": f"gan:{generators.untrained}"},
    }


def of_one_length(families: str) -> str:
    """Return the models of a family whose features have equal length, as FedProto requires."""
    from espalier.models.families import family_models

    models = family_models(families)
    wide = [model for model in models if model not in NARROW]
    return ",".join(wide) or models[0]


def table_cells(
    setup: Setup, families: str, generators: Generators, more: Values, only: Collection[tuple[str, str]]
) -> dict[tuple[str, str], list[Cell]]:
    """Return the cells of the table by regime and method, for the pairs in `only`; `more` adds settings to all."""
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
    """Return the cells of a single client with the paper's CNN, by shots and method."""
    known = methods("cnn4", generators)
    known[AS_AUTHORS] = {**known["FedKTL"], "transfer-weight": HEAVY}
    return {
        (shots, label): _cells(
            alone(setup), f"iid+shots={shots}", {"rounds": ROUNDS_ALONE, **known[label], **more}
        )
        for shots in all_shots
        for label in ("local only", "FedKTL, mu=0", "FedKTL", AS_AUTHORS)
    }


def alone(setup: Setup) -> Setup:
    """Return the set-up of one client, whose shots and test images come from a tenth of the data."""
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
    """Return the generators of a data set; those of an earlier run in the folder are reused.

    Parameters
    ----------
    folder : Path
        Parent folder; each generator has a folder named after the data set.
    data : str
        A named data set.
    root : Path
        Folder of the data files.
    steps : int
        Training steps, which make the generator independent of the machine's load.
    minutes : float, optional
        Training time, instead of `steps`.
    """
    import torch

    from espalier.data.spec import open_data
    from espalier_server.generators.gan import INDEX, save_gan
    from espalier_server.generators.networks import GanConfig, StyleGenerator, native_size
    from espalier_server.generators.pretrain import pretrain, sample_grid

    generators = Generators(folder.resolve() / data, folder.resolve() / f"{data}-untrained")
    images = open_data(data, root=root)
    channels, size, _ = images.shape
    if not (generators.trained / INDEX).exists():
        network, notes = pretrain(images, minutes=minutes, steps=None if minutes else steps)
        save_gan(generators.trained, network, notes, sample_grid(network, seed=0))
    if not (generators.untrained / INDEX).exists():
        config = GanConfig(native_size(size), channels, len(images.classes))
        drawn = StyleGenerator(config, torch.Generator().manual_seed(0)).eval()
        save_gan(generators.untrained, drawn, {"data": data, "steps": 0}, sample_grid(drawn, seed=0))
    return generators
