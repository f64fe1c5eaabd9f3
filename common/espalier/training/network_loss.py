"""The loss of a network that is given by its tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from espalier.models.architecture import build_with
from espalier.seeds import seed_for
from espalier.tasks.base import base_objective, dataset_loss
from espalier.training.objectives import LocalRound


def network_loss(local: LocalRound, tensors: Mapping[str, Tensor]) -> float:
    """Return F_k of a network of the round's architecture, over all of the client's images.

    Parameters
    ----------
    local : LocalRound
        Architecture, images, settings; its randomness depends on run seed, client name and round.
    tensors : mapping of str to Tensor
        The network's tensors; not written to.
    """
    assert local.architecture is not None
    assert local.data is not None
    place = torch.device(local.place)
    model = build_with(local.architecture, dict(tensors)).to(place)
    objective = base_objective(local.settings)
    objective.begin(model, local)
    seed = seed_for(local.settings.seed, local.name, local.round, "network loss")
    generator = torch.Generator(device=place).manual_seed(seed)
    return dataset_loss(model, objective, local.data, place, local.settings.batch_size, generator)
