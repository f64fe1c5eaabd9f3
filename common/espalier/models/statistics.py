"""Statistics of static batch normalisation (HeteroFL's sBN): clients collect them, evaluation uses them.

A static layer has no running statistics in training. A network is evaluated with the mean, over batches, of the
batches' means and unbiased variances. That mean does not depend on the order of the batches, and the mean of several
clients' statistics, weighted by their numbers of batches, is that of all their batches.
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
    """Statistics of the inputs of one normalisation layer.

    Attributes
    ----------
    mean, var : numpy.ndarray
        float32 [channels]: means over the batches of the batches' means and unbiased variances.
    batches : int
        Number of batches; if it is 0, the mean is 0 and the variance 1.
    """

    mean: np.ndarray
    var: np.ndarray
    batches: int


def batch_statistics(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Statistics]:
    """Run a network with static normalisation over batches and collect the statistics of its layers.

    Parameters
    ----------
    model : nn.Module
        Run in training mode without gradients and Scalers; its mode is restored afterwards. Its tensors do not
        change.
    batches : iterable of Tensor
        float32 [B, C, H, W] images in [-1, 1]; moved to the model's device.

    Returns
    -------
    dict of str to Statistics
        By path of the normalisation layer; empty if there is none. A batch with a single value per channel has no
        variance and is not counted for that layer.

    Raises
    ------
    ValueError
        A layer has running statistics, which this would change.
    """
    layers = _layers(model)
    if running := [path for path, layer in layers.items() if layer.track_running_stats]:
        raise ValueError(f"normalisation {running[0]!r} has running statistics; it is not static")
    if not layers:
        return {}
    device = next(model.parameters()).device
    sums = {
        path: _LayerSums(torch.zeros(2, layer.num_features, dtype=torch.float64, device=device))
        for path, layer in layers.items()
    }
    hooks = [layer.register_forward_pre_hook(sums[path]) for path, layer in layers.items()]
    training = model.training
    try:
        model.train()
        for module in model.modules():
            if isinstance(module, Scaler):
                module.eval()  # evaluation does not scale, and the statistics must match it
        with torch.no_grad():
            for images in batches:
                model(images.to(device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {path: one.result() for path, one in sums.items()}


class _LayerSums:
    """A forward pre-hook that sums the means and variances of a layer's input batches."""

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
        Not modified.
    statistics : mapping of str to Statistics
        Of every normalisation layer, by path, as :func:`batch_statistics` returns them.

    Returns
    -------
    nn.Module
        In evaluation mode; its normalisation is "batch", with these running statistics.

    Raises
    ------
    ValueError
        A layer has no statistics or statistics of another width, or there are statistics of an unknown layer.
    """
    layers = _layers(model)
    if unlike := set(layers).symmetric_difference(statistics):
        path = min(unlike)
        raise ValueError(
            f"normalisation {path!r} "
            + ("has no statistics" if path in layers else "is not part of the network")
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
