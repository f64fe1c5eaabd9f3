"""Loss and gradient of a network over all of a client's images: F_k(w) and its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from espalier import lazy, models
from espalier.seeds import seed_for
from espalier.tasks.base import base_objective, dataset_gradient, dataset_loss
from espalier.training.objectives import LocalRound, Objective

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn

    from espalier.data.imageset import ImageSet
else:
    torch = lazy.load("torch")


def local_loss(model: nn.Module, local: LocalRound, purpose: str) -> float:
    """Return F_k of a network: the task's mean loss over all of the client's images.

    Parameters
    ----------
    model : nn.Module
        On its device.
    local : LocalRound
        Images and settings.
    purpose : str
        Name of the measurement. Its randomness derives from (run seed, client name, round, purpose).
    """
    return dataset_loss(*_measurement(model, local, purpose))


def local_gradient(model: nn.Module, local: LocalRound, purpose: str) -> dict[str, np.ndarray]:
    """Return the gradient of F_k, float32 by parameter name; parameters as in :func:`local_loss`."""
    return dataset_gradient(*_measurement(model, local, purpose))


def network_loss(local: LocalRound, tensors: Mapping[str, Tensor]) -> float:
    """Return F_k of a network of the round's architecture.

    Parameters
    ----------
    local : LocalRound
        Architecture, images, settings; its randomness depends on run seed, client name and round.
    tensors : mapping of str to Tensor
        The network's tensors; not written to.
    """
    assert local.architecture is not None
    model = models.build_with(local.architecture, dict(tensors)).to(torch.device(local.place))
    return local_loss(model, local, "network loss")


def _measurement(
    model: nn.Module, local: LocalRound, purpose: str
) -> tuple[nn.Module, Objective, ImageSet, torch.device, int, Generator]:
    """Return the arguments of `dataset_loss` and `dataset_gradient`."""
    settings, device = local.settings, next(model.parameters()).device
    objective = base_objective(settings)
    objective.begin(model, local)
    generator = torch.Generator(device=device)
    generator.manual_seed(seed_for(settings.seed, local.name, local.round, purpose))
    return model, objective, local.require_data(), device, settings.batch_size, generator
