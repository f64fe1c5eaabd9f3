"""What the tests of local objectives share: images in memory, small networks, gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from espalier.config.fields import key_of
from espalier.config.run_settings import keys_of
from espalier.data.imageset import ImageSet
from espalier.methods.run_config import RunConfig
from espalier.models.initial import initial_model
from espalier.tasks.classification import CrossEntropy
from espalier.training.objectives import LocalResult, LocalRound, Objective
from espalier_client.trainer import train_local


class Images:
    """Random 8x8 images in memory, of classes 0 to 9 in turn."""

    def __init__(self, count: int, channels: int = 1) -> None:
        generator = Generator().manual_seed(count)
        self.images = torch.rand(count, channels, 8, 8, generator=generator) * 2 - 1
        self.labels = np.arange(count, dtype=np.int64) % 10
        self.classes = tuple("0123456789")
        self.shape = (channels, 8, 8)
        self.name = "random"

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: np.ndarray) -> Tensor:
        return self.images[torch.from_numpy(indices)]

    def subset(self, indices: np.ndarray) -> ImageSet:
        raise NotImplementedError


def network(model: str, **changes: Any) -> Any:
    """Return a fresh network of a preset for 8x8 images of 10 classes, the same every time."""
    settings = RunConfig(model=model, seed=changes.pop("seed", 1))
    return initial_model(settings, (1, 8, 8), classes=10, **changes)


def received(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def local_round(model: nn.Module, preset: str = "cnn", round_: int = 1, **known: Any) -> LocalRound:
    """Return the round of a client that was just given `model`."""
    names = {name: known.pop(name) for name in tuple(known) if key_of(name) in keys_of(RunConfig.groups())}
    values: dict[str, Any] = {"model": preset, "learning_rate": 0.1, "clip_norm": 0.0} | names
    settings = RunConfig(**values)
    return LocalRound(settings, round_, received(model), name="client", **known)


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    data = Images(count)
    return data.images, torch.from_numpy(data.labels)


def gradients(objective: Objective, model: nn.Module, seed: int = 0, count: int = 6) -> dict[str, Tensor]:
    """Return the gradients of one batch's loss, zeros where there is none."""
    model.zero_grad()
    images, labels = batch(count)
    torch.autograd.backward(objective.loss(model, images, labels, Generator().manual_seed(seed)))
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def moved(model: nn.Module, by: float = 0.1, seed: int = 3) -> nn.Module:
    """Move every parameter by noise, as a training would."""
    generator = Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return model


def result(lr_sum: float = 0.1, steps: int = 1) -> LocalResult:
    return LocalResult(steps=steps, samples=6, loss=0.0, lr_sum=lr_sum, seconds=0.0)


class Quadratic(Objective):
    """Half the squared distance of a vector to a client's own optimum, the same on every batch."""

    def __init__(self, optimum: list[float]) -> None:
        self.optimum = torch.tensor(optimum)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        return (model.get_parameter("theta") - self.optimum).square().sum() / 2


class Vector(nn.Module):
    """A network that is one vector, and a buffer."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(values))
        self.register_buffer("counter", torch.tensor(1.0))


def train_in_one_batch(model: nn.Module, objective: Objective, local: LocalRound) -> dict[str, float]:
    """Train on eight images in one batch, and end with exactly what was trained; return the report's scalars."""
    outcome = train_local(model, objective, Images(8), local, seed=1, device="cpu")
    return objective.end(model, outcome, received(model))


def added_loss(term: Objective, model: Any, seed: int = 0) -> float:
    """Return what a term adds to the cross-entropy of :func:`batch`."""
    images, labels = batch()
    whole = (CrossEntropy() + term).loss(model, images, labels, Generator().manual_seed(seed)).item()
    with torch.no_grad():
        return whole - functional.cross_entropy(model(images), labels).item()
