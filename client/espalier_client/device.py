"""What is local to a device: its data, its state on disk and its processor, opened once a process."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from espalier.data.joined import with_pixels
from espalier.data.spec import open_data, open_test
from espalier.errors import ConfigError
from espalier.flower.node_state import load_key
from espalier.models.presets import classifiers
from espalier.names import check_name, is_name
from espalier.seeds import seed_for
from espalier.storage.tensor_file import read_tensors, write_tensors
from espalier.wire import control
from espalier.wire.hello import device_facts
from espalier_client.budget import Budget
from espalier_client.histogram import label_histogram
from espalier_client.speed import measured_speed
from espalier_client.state import StateStore
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    import torch
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    from espalier.data.imageset import ImageSet


@dataclass(frozen=True)
class Device:
    """A device's own settings.

    Attributes
    ----------
    name : str
        The client's name.
    data : str
        Data SPEC: a named data set with a partition, or a folder.
    device : str
        "auto", "cpu", "cuda" or "cuda:N".
    state : Path or None
        Folder of what outlives the process; without one the device starts every round afresh.
    level : float
        Size of sub-model set by hand, a share in (0, 1]; 0: not set.
    model: str
        The network that the owner chose for it in runs of unlike models; "": the run's choice.
    key : Path or None
        Private key of the node it runs in; without it the device cannot sign what it sends.
    privacy_budget : float
        Largest epsilon, over all runs, that its owner grants (`espalier_client.budget`); 0: no limit.
    noise_seed : int or None
        Seed of the noise that protects the images, for tests alone: who knows it can subtract the noise.
        None draws it from the operating system.
    homes : int
        How many edges it was given; 0: not known.
    """

    name: str
    data: str
    device: str = "auto"
    state: Path | None = None
    level: float = 0.0
    model: str = ""
    key: Path | None = None
    privacy_budget: float = 0.0
    noise_seed: int | None = None
    homes: int = 0

    @classmethod
    def from_node_config(cls, config: Mapping[str, object]) -> Device:
        """Read the settings from Flower's node config, where our client and a stock SuperNode put them.

        Raises
        ------
        ConfigError
            If name or data is missing, the level is no share in (0, 1], the model no classifier's name, or
            the privacy budget no number above 0.
        """
        missing = [key for key in ("name", "data") if not config.get(key)]
        if missing:
            raise ConfigError(
                f"node config lacks {' and '.join(missing)}; start the node with "
                '--node-config \'name="cam-7" data="digits:0/2" state="/var/lib/espalier"\''
            )
        state, key = config.get("state"), config.get("key")
        return _device(
            str(config["name"]),
            str(config["data"]),
            str(config.get("device") or "auto"),
            Path(str(state)) if state else None,
            _level(config.get("level")),
            _model(config.get("model")),
            Path(str(key)) if key else None,
            _budget(config.get("privacy-budget")),
            _noise_seed(config.get("noise-seed")),
            int(str(config.get("homes") or 0)),
        )

    @cached_property
    def images(self) -> ImageSet:
        """The device's training images."""
        return open_data(self.data)

    @cached_property
    def test_images(self) -> ImageSet | None:
        """The device's own test images, None where its data has none."""
        return open_test(self.data)

    @cached_property
    def labels(self) -> np.ndarray:
        """Label counts, shape (classes,)."""
        return label_histogram(self.images.labels, len(self.images.classes))

    @cached_property
    def torch_device(self) -> torch.device:
        """Where the device trains."""
        from espalier.training.device import resolve_device

        return resolve_device(self.device)

    @cached_property
    def node_key(self) -> EllipticCurvePrivateKey | None:
        """The key that signs what the device sends; None where its node config names none."""
        return load_key(self.key) if self.key else None

    def keep_filled(self, run: str, pixels: np.ndarray, labels: np.ndarray) -> None:
        """Keep images that were made for a run (FAug), beside the device's own."""
        self._filled[run] = (pixels, labels)
        if self.state:
            write_tensors(self._filled_path(run), {"pixels": pixels, "labels": labels})

    def images_for(self, run: str) -> ImageSet:
        """Return what the device trains on in a run: its own images, and those made for the run."""
        if run not in self._filled and self.state and is_name(run) and self._filled_path(run).exists():
            kept = read_tensors(self._filled_path(run))
            self._filled[run] = (kept["pixels"], kept["labels"])
        return with_pixels(self.images, *self._filled[run]) if run in self._filled else self.images

    def _filled_path(self, run: str) -> Path:
        assert self.state is not None
        check_name(run, "run id")
        return self.state / "faug" / f"{run}.safetensors"

    @cached_property
    def _filled(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {}

    def load_state(self, run: str, start: pb.Version, *, exact: bool = False) -> dict[str, np.ndarray]:
        """Return the device's own state of a run at a version, {} where it has none.

        Raises
        ------
        StateError
            See `StateStore.load`.
        """
        return self._store.load(run, (start.window, start.round), exact=exact) if self._store else {}

    def save_state(self, plan: pb.RoundPlan, state: Mapping[str, np.ndarray]) -> None:
        """Keep the state that training in a round left."""
        if self._store:
            self._store.save(
                plan.run, (plan.window, plan.round), state, checkpoint_window=plan.checkpoint_window
            )

    def hello(self, run: str, histogram_epsilon: float) -> pb.ClientHello:
        """Introduce the device: samples, label counts, facts; never an image.

        Parameters
        ----------
        run : str
            Espalier's run id.
        histogram_epsilon : float
            Epsilon of Laplace noise on the label counts; 0 for none.

        Raises
        ------
        ConfigError
            The noise cannot be kept, or the owner's budget does not allow this answer.
        """
        counts = self.labels
        if histogram_epsilon > 0:
            rng = self.private_rng(0, f"histogram {run}")
            counts = self.budget.histogram(run, counts, histogram_epsilon, rng)
        elif self.privacy_budget:
            raise ConfigError(
                f"the owner of {self.name} grants a privacy budget, so its exact label counts stay at home; "
                "set histogram-epsilon in the run"
            )
        place = self.torch_device
        facts = device_facts(str(place))
        facts.speed = measured_speed(place)
        return pb.ClientHello(
            schema=control.SCHEMA,
            name=self.name,
            samples=len(self.images),
            histogram=pb.LabelHistogram(counts=counts.tolist(), noisy=histogram_epsilon > 0),
            facts=facts,
            image_shape=self.images.shape,
            classes=self.images.classes,
            data=self.images.name,
            level=self.level,
            model=self.model,
            homes=self.homes,
        )

    @cached_property
    def _store(self) -> StateStore | None:
        return StateStore(self.state / "rounds") if self.state else None

    @cached_property
    def budget(self) -> Budget:
        """The ledger of what was spent.

        Raises
        ------
        ConfigError
            The device has no folder to keep it in.
        """
        if self.state is None:
            raise ConfigError(
                f"{self.name} has no state folder, so it would forget what privacy it spent; give it one, "
                'e.g. --state DIR, or state="/var/lib/espalier" in a node config'
            )
        return Budget(self.state / "privacy.json", self.privacy_budget)

    def private_seed(self, round_: int, purpose: str) -> int:
        """Return a fresh 63-bit secret seed of noise; the run's own seed is known to every server."""
        if self.noise_seed is not None:
            return seed_for(self.noise_seed, self.name, round_, purpose)
        return secrets.randbits(63)

    def private_rng(self, round_: int, purpose: str) -> np.random.Generator:
        """Return a fresh generator of noise, seeded by 128 secret bits of the operating system."""
        if self.noise_seed is not None:
            return np.random.default_rng(self.private_seed(round_, purpose))
        return np.random.default_rng(secrets.randbits(128))


@cache  # as many as the process has clients
def _device(
    name: str,
    data: str,
    device: str,
    state: Path | None,
    level: float,
    model: str,
    key: Path | None,
    privacy_budget: float,
    noise_seed: int | None,
    homes: int,
) -> Device:
    return Device(name, data, device, state, level, model, key, privacy_budget, noise_seed, homes)


def _level(value: object) -> float:
    """Read the level of a node config: a number, or the text of one; None where it is left open."""
    if value is None:
        return 0.0
    level = _number(value)
    if not 0 < level <= 1:  # NaN fails here, too
        raise ConfigError(
            f"level={value} is no share in (0, 1]; give the largest sub-model this device can train, "
            "e.g. --level 0.5, or level=0.5 in a node config"
        )
    return level


def _model(value: object) -> str:
    """Read the model of a node config; None where it is left open."""
    if value is None:
        return ""
    if value not in classifiers():
        raise ConfigError(
            f"model={value} is no classifier; give one of {', '.join(classifiers())}, "
            "e.g. --model resnet10, or model=resnet10 in a node config"
        )
    return str(value)


def _number(value: object) -> float:
    """Read a number, or the text of one; NaN where it is neither."""
    try:
        return math.nan if isinstance(value, bool) else float(str(value))
    except ValueError:
        return math.nan


def _budget(value: object) -> float:
    """Read the privacy budget of a node config; None where there is no limit."""
    if value is None:
        return 0.0
    budget = _number(value)
    if not 0 < budget < math.inf:
        raise ConfigError(
            f"privacy-budget={value} is no number above 0; give the largest epsilon that this device may spend, "
            "e.g. --privacy-budget 8"
        )
    return budget


def _noise_seed(value: object) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ConfigError(f"noise-seed={value} is no whole number; leave it out but in tests")
    return value
