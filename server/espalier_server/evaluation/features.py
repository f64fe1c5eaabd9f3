"""Feature networks for quality measures: a classifier trained on the data set, or Inception-v3."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from espalier.data.imageset import ImageSet, to_float, to_uint8
from espalier.data.sources import default_root
from espalier.distribution import install_command
from espalier.errors import ConfigError, DataError
from espalier.seeds import rng_for, seed_for
from espalier.storage.atomic import replacing
from espalier.torchvision_shim import import_torchvision

log = logging.getLogger(__name__)

KINDS = ("classifier", "inception")

_BATCH = 256
_MAX_TRAINING = 20_000
_DIMS = 64
_STEPS = (300, 600)
_CLASSIFIER_VERSION = "classifier-1"
"""Part of a cached classifier's key; to be increased when the network or its training changes."""

_INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
_INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{_INCEPTION_FILE}"


class Features(Protocol):
    """A frozen network that maps images to features and class logits."""

    @property
    def name(self) -> str:
        """Name of the features for captions: "digits features", "Inception-v3 features"."""

    @property
    def is_inception(self) -> bool:
        """Whether the Fréchet distance of these features is the published FID."""

    def extract(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map images [N, C, H, W] in [-1, 1] to features [N, D] and logits [N, K], float64 on the CPU."""


def open_features(
    kind: str,
    train: ImageSet,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    download: bool | None = None,
) -> Features:
    """Return the feature network of a kind; a classifier is trained when it is first used.

    Parameters
    ----------
    kind : {"classifier", "inception"}
        A classifier trained on `train`, or Inception-v3 with the weights of the published FID.
    train : ImageSet
        Training images of the data set.
    seed : int
        Seed of the classifier's initial weights and batches.
    device : torch.device or str
        Where to compute.
    cache : Path, optional
        Folder in which trained classifiers are stored, by a hash of the images and the seed.
    download : bool, optional
        Whether missing Inception weights may be downloaded; by default, if ESPALIER_DOWNLOAD is 1.

    Raises
    ------
    ConfigError
        The kind is unknown.
    DataError
        The data cannot train a classifier, or the Inception weights are missing or damaged.
    """
    if kind == "classifier":
        return ClassifierFeatures(train, seed=seed, device=device, cache=cache)
    if kind == "inception":
        allowed = os.environ.get("ESPALIER_DOWNLOAD") == "1" if download is None else download
        return InceptionFeatures(device=device, download=allowed)
    raise ConfigError(f"features={kind!r} is not known; give one of {', '.join(KINDS)}")


class _Classifier(nn.Module):
    """A convolutional classifier for images of any size; its penultimate layer gives the features."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs, side = channels, size
        # The first layer halves large images, too, so that their cost is similar to that of small ones.
        while not layers or side > 4:
            width, stride = (64, 2) if layers else (32, 2 if side > 8 else 1)
            layers += [nn.Conv2d(inputs, width, 3, stride, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            inputs, side = width, -(-side // stride)
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.2))
        self.features = nn.Sequential(nn.Linear(inputs * 16, _DIMS), nn.SiLU())
        self.head = nn.Linear(_DIMS, classes)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(self.body(images))
        return features, self.head(features)


class ClassifierFeatures:
    """Features of a small classifier, which is trained on the data set when they are first used.

    Parameters
    ----------
    train : ImageSet
        Training images of at least two classes; at most 20,000 of them, drawn by seed, are used.
    seed : int
        Seed of the initial weights and batches; it determines the network for given images and machine.
    device : torch.device or str
        Where to compute.
    cache : Path, optional
        Folder in which the trained network is stored.

    Raises
    ------
    DataError
        The images are of fewer than two classes.
    """

    is_inception = False

    def __init__(
        self, train: ImageSet, *, seed: int, device: torch.device | str = "cpu", cache: Path | None = None
    ) -> None:
        if len(np.unique(train.labels)) < 2:
            raise DataError(
                f"data {train.name!r} hold images of fewer than two classes, so no classifier can be trained "
                "to measure quality with: set features=inception, or give images of more classes"
            )
        self.name = f"{train.name} features"
        self.device = torch.device(device)
        self._train, self._seed, self._cache = train, seed, cache

    @cached_property
    def model(self) -> nn.Module:
        """The network, loaded from the cache or trained upon first use, which takes seconds."""
        train, seed, cache = self._train, self._seed, self._cache
        chosen = np.arange(len(train), dtype=np.int64)
        if len(train) > _MAX_TRAINING:
            chosen = np.sort(
                rng_for(seed, train.name, 0, "features/choice").permutation(chosen)[:_MAX_TRAINING]
            )
        pixels = torch.cat(
            [to_uint8(train.fetch(part)) for part in np.array_split(chosen, len(chosen) // _BATCH + 1)]
        )
        labels = torch.from_numpy(train.labels[chosen])
        channels, size, _ = train.shape
        with torch.random.fork_rng(devices=[]):  # torch's global generator is left as it was
            torch.manual_seed(seed_for(seed, train.name, 0, "features/init"))
            model = _Classifier(channels, size, len(train.classes)).to(self.device)
            file = cache / f"{_key(pixels, labels, len(train.classes), seed)}.safetensors" if cache else None
            if file is None or not _load(model, file):
                _fit(model, pixels, labels, rng_for(seed, train.name, 0, "features/batches"), self.device)
                if file is not None:
                    _save(model, file)
        return model.eval().requires_grad_(False)

    def extract(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map images [N, C, H, W] in [-1, 1] to features [N, 64] and logits [N, K], float64 on the CPU."""
        model = self.model  # trained here if necessary, outside inference mode
        return _extract(images, lambda part: model(part.to(self.device)))


class InceptionFeatures:
    """The 2048 pool features of the Inception-v3 that the published FID uses (Heusel et al., 2017).

    Parameters
    ----------
    device : torch.device or str
        Where to compute.
    download : bool
        Whether missing weights may be downloaded.

    Raises
    ------
    DataError
        The weights are absent or damaged, or torch-fidelity is not installed.
    """

    name = "Inception-v3 features"
    is_inception = True

    def __init__(self, *, device: torch.device | str = "cpu", download: bool = False) -> None:
        import_torchvision()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise DataError(
                f"features=inception needs torch-fidelity, which is not installed; run: {install_command('cloud')}"
            ) from error
        file = _inception_file(download)
        try:
            # torch-fidelity unpickles the file without restrictions, so check first that it holds tensors only.
            torch.load(file, map_location="cpu", weights_only=True)
            model = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file)
            )
        except Exception as error:
            raise DataError(
                f"the Inception-v3 weights in {file} are damaged: remove the file ({error})"
            ) from error
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()

    def extract(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map images [N, C, H, W] in [-1, 1] to features [N, 2048] and logits [N, 1008], float64, CPU."""

        def forward(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            colour = part.expand(-1, 3, -1, -1) if part.shape[1] == 1 else part
            features, logits = self.model(to_uint8(colour).to(self.device))
            return features, logits

        return _extract(images, forward)


class _Forward(Protocol):
    def __call__(self, part: torch.Tensor, /) -> tuple[torch.Tensor, torch.Tensor]: ...


def _extract(images: torch.Tensor, forward: _Forward) -> tuple[torch.Tensor, torch.Tensor]:
    features, logits = [], []
    with torch.inference_mode():
        for part in torch.split(images, _BATCH):
            part_features, part_logits = forward(part)
            features.append(part_features.double().cpu())
            logits.append(part_logits.double().cpu())
    return torch.cat(features), torch.cat(logits)


def _fit(
    model: nn.Module,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    rng: np.random.Generator,
    device: torch.device,
) -> None:
    """Train a classifier: Adam, cosine schedule, 5 epochs but at least 300 and at most 600 steps."""
    batch = min(128, len(labels))
    steps = min(_STEPS[1], max(_STEPS[0], 5 * len(labels) // batch))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    # Label smoothing bounds the logits, so that the exponentials of the Inception Score stay finite.
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    model.train()
    for chosen in _batches(len(labels), batch, steps, rng):
        images = to_float(pixels[chosen]).to(device)
        _, logits = model(images)
        optimizer.zero_grad()
        torch.autograd.backward(loss(logits, labels[chosen].to(device)))
        optimizer.step()
        schedule.step()


def _batches(count: int, batch: int, steps: int, rng: np.random.Generator) -> Iterator[torch.Tensor]:
    order = np.empty(0, np.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = np.concatenate([order, rng.permutation(count)])
        yield torch.from_numpy(order[:batch])
        order = order[batch:]


def _key(pixels: torch.Tensor, labels: torch.Tensor, classes: int, seed: int) -> str:
    """Return the cache key of a classifier: a hash of everything that it depends on."""
    digest = hashlib.sha256(f"{_CLASSIFIER_VERSION}/{tuple(pixels.shape)}/{classes}/{seed}".encode())
    digest.update(pixels.numpy().tobytes())
    digest.update(labels.numpy().tobytes())
    return f"{_CLASSIFIER_VERSION}-{digest.hexdigest()[:16]}"


def _load(model: nn.Module, file: Path) -> bool:
    if not file.is_file():
        return False
    try:
        model.load_state_dict(load_file(file))
    except (safetensors.SafetensorError, RuntimeError, OSError) as error:
        log.warning("cannot read the cached classifier %s, training it again (%s)", file, error)
        return False
    return True


def _save(model: nn.Module, file: Path) -> None:
    with replacing(file) as temporary:
        save_file({name: value.cpu() for name, value in model.state_dict().items()}, temporary)


def _inception_file(download: bool) -> Path:
    hub_file = Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION_FILE
    files = (default_root() / _INCEPTION_FILE, hub_file)
    for file in files:
        if file.is_file():
            return file
    if not download:
        raise DataError(
            f"features=inception needs {_INCEPTION_FILE} in {files[0].parent} or {hub_file.parent}: "
            "put it there, set ESPALIER_DOWNLOAD=1 to download it, or set features=classifier"
        )
    hub_file.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(_INCEPTION_URL, str(hub_file), hash_prefix="6726825d", progress=False)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"the Inception-v3 weights could not be downloaded from {_INCEPTION_URL}: {error}"
        ) from error
    return hub_file
