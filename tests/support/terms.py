"""What the tests of local objectives share: images in memory, small networks, gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from espalier.config.fields import key_of
from espalier.config.run_settings import keys_of
from espalier.data.imageset import ImageSet
from espalier.methods.run_config import RunConfig
from espalier.models.initial import initial_model
from espalier.training.objectives import LocalResult, LocalRound, Objective


class Images:
    """Random 8x8 images in memory, of classes 0 to 9 in turn."""

    def __init__(self, count: int) -> None:
        generator = Generator().manual_seed(count)
        self.images = torch.rand(count, 1, 8, 8, generator=generator) * 2 - 1
        self.labels = np.arange(count, dtype=np.int64) % 10
        self.classes = tuple("0123456789")
        self.shape = (1, 8, 8)
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
