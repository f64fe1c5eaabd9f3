"""The resources of a device: its data, state folder, node key and processor, opened once per process."""

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
from espalier.training.device import resolve_device
from espalier.wire import control
from espalier.wire.hello import device_facts
from espalier_client.histogram import label_histogram
from espalier_client.privacy_ledger import PrivacyLedger
from espalier_client.speed import measured_speed
from espalier_client.state import StateStore
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    import torch
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    from espalier.data.imageset import ImageSet


@dataclass(frozen=True)
class Device:
    """The settings of a device, and the resources that they name.

    Attributes
    ----------
    name : str
        The client's name.
    data : str
        Data SPEC: a named data set with a partition, or a folder.
    device : str
        "auto", "cpu", "cuda" or "cuda:N".
    state : Path or None
        State folder; without one the device has no state between rounds.
    level : float
        Sub-model size that the owner sets, a share in (0, 1]; 0: not set.
    model : str
        The network that the owner sets for runs of heterogeneous models; "": the run's choice.
    key : Path or None
        File of the node's private key; without it the device does not sign its replies.
    privacy_budget : float
        Largest epsilon over all runs that the owner allows (`espalier_client.privacy_ledger`); 0: no limit.
    noise_seed : int or None
        Seed of the differential-privacy noise, for tests only: the noise can be subtracted by anyone who knows the
        seed. None seeds it from the operating system.
    homes : int
        Number of edges that the client was started with; 0: unknown.
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
        """Read the settings from Flower's node config.

        Raises
        ------
        ConfigError
            If name or data is missing, the level is outside (0, 1], the model is not a classifier, or the privacy
            budget is not a number above 0.
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
        """The device's own test images; None if its data has no test split."""
        return open_test(self.data)

    @cached_property
    def labels(self) -> np.ndarray:
        """Label counts, shape (classes,)."""
        return label_histogram(self.images.labels, len(self.images.classes))

    @cached_property
    def torch_device(self) -> torch.device:
        """The torch device that the client trains on."""
        return resolve_device(self.device)

    @cached_property
    def node_key(self) -> EllipticCurvePrivateKey | None:
        """The key that signs replies; None if the node config names none."""
        return load_key(self.key) if self.key else None

    def store_generated(self, run: str, pixels: np.ndarray, labels: np.ndarray) -> None:
        """Store images that were generated for a run (FAug); `images_for` adds them to the device's own."""
        self._filled[run] = (pixels, labels)
        if self.state:
            write_tensors(self._filled_path(run), {"pixels": pixels, "labels": labels})

    def images_for(self, run: str) -> ImageSet:
        """Return the training images of a run: the device's own and those that were generated for the run."""
        if run not in self._filled and self.state and is_name(run) and self._filled_path(run).exists():
            stored = read_tensors(self._filled_path(run))
            self._filled[run] = (stored["pixels"], stored["labels"])
        return with_pixels(self.images, *self._filled[run]) if run in self._filled else self.images

    def _filled_path(self, run: str) -> Path:
        assert self.state is not None
        check_name(run, "run id")
        return self.state / "faug" / f"{run}.safetensors"

    @cached_property
    def _filled(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {}

    def load_state(self, run: str, start: pb.Version, *, exact: bool = False) -> dict[str, np.ndarray]:
        """Return the device's state of a run at a version; empty if there is none.

        Raises
        ------
        StateError
            See `StateStore.load`.
        """
        return self._store.load(run, (start.window, start.round), exact=exact) if self._store else {}

    def save_state(self, plan: pb.RoundPlan, state: Mapping[str, np.ndarray]) -> None:
        """Write the state after a round of training."""
        if self._store:
            self._store.save(
                plan.run, (plan.window, plan.round), state, checkpoint_window=plan.checkpoint_window
            )

    def hello(self, run: str, histogram_epsilon: float) -> pb.ClientHello:
        """Return the device's hello: samples, label counts and hardware; it contains no image.

        Parameters
        ----------
        run : str
            Espalier's run id.
        histogram_epsilon : float
            Epsilon of the Laplace noise on the label counts; 0: no noise.

        Raises
        ------
        ConfigError
            The noisy counts cannot be stored, or the owner's privacy budget does not allow this answer.
        """
        counts = self.labels
        if histogram_epsilon > 0:
            rng = self.private_rng(0, f"histogram {run}")
            counts = self.privacy_ledger.histogram(run, counts, histogram_epsilon, rng)
        elif self.privacy_budget:
            raise ConfigError(
                f"the owner of {self.name} limits its privacy budget, so its exact label counts are not sent; "
                "set histogram-epsilon in the run"
            )
        facts = device_facts(str(self.torch_device))
        facts.speed = measured_speed(self.torch_device)
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
    def privacy_ledger(self) -> PrivacyLedger:
        """The device's privacy ledger.

        Raises
        ------
        ConfigError
            The device has no state folder.
        """
        if self.state is None:
            raise ConfigError(
                f"{self.name} has no state folder for its privacy ledger; give it one, "
                'e.g. --state DIR, or state="/var/lib/espalier" in a node config'
            )
        return PrivacyLedger(self.state / "privacy.json", self.privacy_budget)

    def private_seed(self, round_: int, purpose: str) -> int:
        """Return a new secret seed of 63 bits for noise; every server knows the run's seed, so it cannot serve."""
        if self.noise_seed is not None:
            return seed_for(self.noise_seed, self.name, round_, purpose)
        return secrets.randbits(63)

    def private_rng(self, round_: int, purpose: str) -> np.random.Generator:
        """Return a new noise generator, seeded with 128 secret bits from the operating system."""
        if self.noise_seed is not None:
            return np.random.default_rng(self.private_seed(round_, purpose))
        return np.random.default_rng(secrets.randbits(128))


@cache  # the process has few clients, and each opens its data once
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
    """Parse the level of a node config, a number or its text; None: not set."""
    if value is None:
        return 0.0
    level = _number(value)
    if not 0 < level <= 1:  # NaN fails here, too
        raise ConfigError(
            f"level={value} is not in (0, 1]; give the largest sub-model that this device can train, "
            "e.g. --level 0.5, or level=0.5 in a node config"
        )
    return level


def _model(value: object) -> str:
    """Check the model of a node config; None: not set."""
    if value is None:
        return ""
    if value not in classifiers():
        raise ConfigError(
            f"model={value} is not a classifier; give one of {', '.join(classifiers())}, "
            "e.g. --model resnet10, or model=resnet10 in a node config"
        )
    return str(value)


def _number(value: object) -> float:
    """Parse a number or its text; NaN if it is neither."""
    try:
        return math.nan if isinstance(value, bool) else float(str(value))
    except ValueError:
        return math.nan


def _budget(value: object) -> float:
    """Parse the privacy budget of a node config; None: no limit."""
    if value is None:
        return 0.0
    budget = _number(value)
    if not 0 < budget < math.inf:
        raise ConfigError(
            f"privacy-budget={value} is not a number above 0; give the largest epsilon that this device may spend, "
            "e.g. --privacy-budget 8"
        )
    return budget


def _noise_seed(value: object) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ConfigError(f"noise-seed={value} is not an integer; it is for tests, otherwise leave it out")
    return value
