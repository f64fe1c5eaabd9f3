"""The objective of each task, and its value and gradient over a whole data set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from espalier import lazy
from espalier.models.presets import task_of
from espalier.tasks.classification import CrossEntropy
from espalier.tasks.diffusion import DDPMLoss
from espalier.training.named_state import trainable_parameters
from espalier.training.objectives import Objective

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn

    from espalier.config.run_settings import RunSettings
    from espalier.data.imageset import ImageSet
else:
    torch = lazy.load("torch")


def base_objective(settings: RunSettings) -> Objective:
    """Return the task's loss without a method's terms: the DDPM loss or cross-entropy."""
    return DDPMLoss() if task_of(settings.model) == "diffusion" else CrossEntropy()


def dataset_loss(
    model: nn.Module,
    objective: Objective,
    data: ImageSet,
    device: torch.device | str,
    batch: int,
    generator: Generator,
    batches: int | None = None,
) -> float:
    """Return the mean objective over a data set.

    Computed in evaluation mode (no dropout, running statistics of batch normalisation), without gradients and in
    single precision. The mode and the buffers of the network do not change.

    Parameters
    ----------
    model : nn.Module
        On `device`.
    objective : Objective
        What to measure; its `begin` was called.
    data : ImageSet
        At least one image.
    device : torch.device or str
        Where to compute.
    batch : int
        Images at a time.
    generator : Generator
        Source of the objective's randomness and of the choice of images, on `device`.
    batches : int, optional
        Use this many random batches of distinct images (Power-of-Choice's cpow-d uses one). None uses every image
        once, in order.

    Returns
    -------
    float
        Mean over the images.
    """
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    with measuring(model), torch.no_grad():
        for images, labels in _batches(data, device, batch, generator, batches):
            total += objective.loss(model, images, labels, generator).double() * len(labels)
            count += len(labels)
    return float(total) / count


def dataset_gradient(
    model: nn.Module,
    objective: Objective,
    data: ImageSet,
    device: torch.device | str,
    batch: int,
    generator: Generator,
) -> dict[str, np.ndarray]:
    """Return the gradient of the mean objective over a data set, computed as in :func:`dataset_loss`.

    The parameters' own ``grad`` is neither read nor written.

    Returns
    -------
    dict of str to numpy.ndarray
        float32, by parameter name; zero where the objective does not depend on a parameter.
    """
    parameters = trainable_parameters(model)
    sums = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    with measuring(model), torch.enable_grad():
        for images, labels in _batches(data, device, batch, generator):
            loss = objective.loss(model, images, labels, generator) * (len(labels) / len(data))
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient
    return {name: total.cpu().numpy() for name, total in sums.items()}


def _batches(
    data: ImageSet,
    device: torch.device | str,
    size: int,
    generator: Generator,
    batches: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    labels, indices = np.asarray(data.labels), np.arange(len(data))
    if batches is not None:
        order = torch.randperm(len(data), generator=generator, device=device)
        indices = order[: batches * size].cpu().numpy()
    for start in range(0, len(indices), size):
        chosen = indices[start : start + size]
        yield data.fetch(chosen).to(device), torch.from_numpy(labels[chosen]).to(device)


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode, and restore the mode of each of its modules."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
