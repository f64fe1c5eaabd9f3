"""Accuracy and loss of a classifier on labelled images, computed in the same way at cloud and clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from espalier.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from espalier.data.imageset import ImageSet

BATCH = 256
"""Default number of images per batch."""


class Score(NamedTuple):
    """Number of correct predictions and of images, and the sum of cross-entropies, so that scores add up."""

    correct: int
    total: int
    loss_sum: float


def accuracy(model: nn.Module, data: ImageSet, device: torch.device | str, batch: int = BATCH) -> Score:
    """Score a classifier in evaluation mode, and restore its mode.

    Parameters
    ----------
    model : nn.Module
        Maps images [B, C, H, W] to logits [B, classes]; moved to `device`.
    data : ImageSet
        The images, possibly none.
    device : torch.device or str
        Where to compute.
    batch : int
        Images at a time; does not change the result of a model that processes images independently.

    Returns
    -------
    Score
        `correct` counts the images whose largest logit is their label's. Images with logits that are not finite
        count as wrong, and make `loss_sum` NaN.

    Raises
    ------
    DataError
        If the model has fewer classes than the data.
    """
    correct, total, loss_sum = class_accuracy(model, data, device, batch)
    return Score(int(correct.sum()), int(total.sum()), loss_sum)


def class_accuracy(
    model: nn.Module, data: ImageSet, device: torch.device | str, batch: int = BATCH
) -> tuple[NDArray[np.int64], NDArray[np.int64], float]:
    """Return the score of :func:`accuracy` by class.

    Returns
    -------
    tuple
        Correct predictions and images of each class, both int64 of shape [classes], and the summed cross-entropy.
    """
    classes = len(data.classes)
    device = torch.device(device)
    labels = torch.from_numpy(np.asarray(data.labels, np.int64))
    right = torch.zeros(len(labels), dtype=torch.bool)
    loss_sum = torch.zeros((), dtype=torch.float64)
    was_training = model.training
    model.to(device).eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(labels), batch):
                chosen = slice(start, start + batch)
                images = data.fetch(np.arange(start, min(start + batch, len(labels)))).to(device)
                logits = model(images).float().cpu()
                if logits.shape[1] < classes:
                    raise DataError(
                        f"data {data.name!r} have {classes} classes, the model {logits.shape[1]}; "
                        "measure on data of the classes it was trained on"
                    )
                right[chosen] = (logits.argmax(1) == labels[chosen]) & logits.isfinite().all(1)
                loss = functional.cross_entropy(logits, labels[chosen], reduction="sum")
                # With an infinite logit the loss is meaningless, so the sum becomes NaN.
                loss_sum += loss.double() if logits.isfinite().all() else float("nan")
    finally:
        model.train(was_training)
    return (
        np.bincount(data.labels[right.numpy()], minlength=classes),
        np.bincount(data.labels, minlength=classes),
        loss_sum.item(),
    )
