"""Statistics of static batch normalisation (HeteroFL's sBN): gathered by clients, given to a network at the end.

A static layer keeps no running statistics while it is trained. What a network is evaluated with is the mean,
over batches, of the batches' means and unbiased variances. That mean does not depend on the batches' order, and
the mean of several clients' statistics, weighted by their numbers of batches, is that of all their batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from espalier.models.architecture import build_with, describe
from espalier.models.layers import Scaler
from espalier.models.variants import with_norm


class Statistics(NamedTuple):
    """What one normalisation layer saw.

    Attributes
    ----------
    mean, var : numpy.ndarray
        float32 [channels]: means over the batches of the batches' means and unbiased variances.
    batches : int
        How many they stand for; where it is 0 the mean is 0 and the variance 1.
    """

    mean: np.ndarray
    var: np.ndarray
    batches: int


def batch_statistics(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Statistics]:
    """Run a network with static normalisation over batches and gather what its layers see.

    Parameters
    ----------
    model : nn.Module
        Run in training mode without gradients, its Scalers off, and left in the mode it was in. Its
        tensors do not change.
    batches : iterable of Tensor
        float32 [B, C, H, W] images in [-1, 1]; moved to the model's device.

    Returns
    -------
    dict of str to Statistics
        By path of the normalisation layer; empty where there is none. A batch that gives a layer only one
        value a channel has no variance and does not count there.

    Raises
    ------
    ValueError
        A layer keeps running statistics of its own, which this would change.
    """
    layers = _layers(model)
    if kept := [path for path, layer in layers.items() if layer.track_running_stats]:
        raise ValueError(f"normalisation {kept[0]!r} keeps running statistics; it is not static")
    if not layers:
        return {}
    device = next(model.parameters()).device
    gathered = {
        path: _Gathered(torch.zeros(2, layer.num_features, dtype=torch.float64, device=device))
        for path, layer in layers.items()
    }
    hooks = [layer.register_forward_pre_hook(gathered[path]) for path, layer in layers.items()]
    training = model.training
    try:
        model.train()
        for module in model.modules():
            if isinstance(module, Scaler):
                module.eval()  # evaluation does not scale, and its statistics must be of what it sees
        with torch.no_grad():
            for images in batches:
                model(images.to(device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {path: one.result() for path, one in gathered.items()}


class _Gathered:
    """Sums of a layer's batch means and variances, gathered before it normalises."""

    def __init__(self, sums: Tensor) -> None:
        self.sums, self.count = sums, 0

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        values = inputs[0].double().transpose(0, 1).flatten(1)
        if values.shape[1] > 1:
            self.sums += torch.stack((values.mean(1), values.var(1)))
            self.count += 1

    def result(self) -> Statistics:
        if self.count == 0:
            width = self.sums.shape[1]
            return Statistics(np.zeros(width, np.float32), np.ones(width, np.float32), 0)
        mean, var = (self.sums / self.count).float().cpu().numpy()
        return Statistics(mean, var, self.count)


def with_statistics(model: nn.Module, statistics: Mapping[str, Statistics]) -> nn.Module:
    """Return a copy of a network with static normalisation that evaluates with given statistics.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    statistics : mapping of str to Statistics
        Of every normalisation layer, by path, as :func:`batch_statistics` returns them.

    Returns
    -------
    nn.Module
        In evaluation mode; its normalisation is "batch", with these running statistics.

    Raises
    ------
    ValueError
        A layer has no statistics, or statistics of another width, or there are statistics of no layer.
    """
    layers = _layers(model)
    if unlike := set(layers).symmetric_difference(statistics):
        path = min(unlike)
        raise ValueError(
            f"normalisation {path!r} "
            + ("has no statistics" if path in layers else "is no part of the network")
        )
    tensors = dict(model.state_dict())
    for path, one in statistics.items():
        like = layers[path].weight
        for leaf, values in (("running_mean", one.mean), ("running_var", one.var)):
            if np.shape(values) != tuple(like.shape):
                raise ValueError(
                    f"the statistics of normalisation {path!r} are {list(np.shape(values))}, "
                    f"the layer is {list(like.shape)}"
                )
            tensors[f"{path}.{leaf}"] = torch.tensor(values, dtype=torch.float32, device=like.device)
        tensors[f"{path}.num_batches_tracked"] = torch.tensor(int(one.batches), device=like.device)
    return build_with(with_norm(describe(model), "batch"), tensors).eval()


def _layers(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
