"""Local training of a client: epochs or steps on one objective, with seeded randomness."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.training.objectives import LocalResult, LocalRound, Objective
from espalier.training.objectives import TrainingError as TrainingError
from espalier_client.optimizers import create_optimizer

if TYPE_CHECKING:
    from espalier.data.imageset import ImageSet


def train_local(
    model: nn.Module,
    objective: Objective,
    data: ImageSet,
    local: LocalRound,
    *,
    seed: int,
    device: torch.device | str,
) -> LocalResult:
    """Train a client's model in one round.

    Every epoch visits every image once in a new order. There are ``local_epochs`` epochs, or with ``local_steps``
    as many as that number of steps needs, the last one incomplete. Gradients are clipped to ``clip_norm`` and
    applied by :mod:`espalier_client.optimizers`.

    The caller calls ``objective.extra`` and ``objective.end``, after it has encoded the update.

    Parameters
    ----------
    model : nn.Module
        Holds the received weights; moved to `device` and trained in place.
    objective : Objective
        The objective to minimise.
    data : ImageSet
        The client's own images.
    local : LocalRound
        Settings and state. The state is replaced at the end, only if training succeeds. Its arrays are not modified,
        unless ``own_state`` permits it.
    seed : int
        Seed of order, noise and dropout, the only source of randomness.
    device : torch.device or str
        Where to train. bf16 autocast is used on CUDA if ``precision`` is auto, and on any device if it is "bf16".

    Returns
    -------
    LocalResult
        Steps, samples, mean loss, sum of learning rates and seconds.

    Raises
    ------
    TrainingError
        If the client has no images, or the loss is not finite.
    """
    settings, count = local.settings, len(data)
    training = TrainingContext(model, data, local, seed, device)
    device, generator = training.device, training.generator
    order = np.random.default_rng(seed)
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    lr_sum, steps, seen = 0.0, 0, 0
    with training.seeded(), _full_convolution_speed(device):
        objective.begin(model, local)
        parameters = [*training.parameters, *objective.parameters()]
        separate = list(objective.separately_clipped_parameters())
        others = set(map(id, separate))
        together = [p for p in parameters if id(p) not in others]
        clipped = [group for group in (together, separate) if group and settings.clip_norm > 0]
        optimizer = create_optimizer(parameters, local)
        for epoch in itertools.count(1):
            indices = order.permutation(count)
            for start in range(0, count, settings.batch_size):
                images, labels = training.batch(indices[start : start + settings.batch_size])
                with _autocast(settings.precision, device):
                    loss = objective.loss(model, images, labels, generator)
                loss.backward()  # type: ignore[no-untyped-call]
                objective.after_backward(model)
                for group in clipped:
                    nn.utils.clip_grad_norm_(group, settings.clip_norm)
                lr_sum += optimizer.step()
                loss_sum += loss.detach() * len(labels)
                steps += 1
                seen += len(labels)
                if steps == settings.local_steps:
                    break
            # One synchronisation per epoch: an update computed from a NaN must not leave the client.
            if not math.isfinite(loss_sum.item()):
                raise TrainingError(
                    f"the loss is not finite in epoch {epoch} of round {local.round}; "
                    "lower learning-rate, or set clip-norm=1 or precision=fp32"
                )
            if steps == settings.local_steps or (not settings.local_steps and epoch == settings.local_epochs):
                break
    optimizer.store(local.state)
    return training.result(steps, loss_sum.item() / seen, lr_sum)


class TrainingContext:
    """What every local training sets up: the network on its device, seeded randomness, batches, and the clocks.

    The clocks start once the network is on its device.

    Parameters
    ----------
    model : nn.Module
        Moved to `device` and set to training mode.
    data : ImageSet
        The client's own images.
    local : LocalRound
        The round's settings.
    seed : int
        Seed of `generator` and, in `seeded`, of torch's global generators.
    device : torch.device or str
        Where to train.

    Attributes
    ----------
    device : torch.device
        The device.
    generator : torch.Generator
        Source of noise and mirroring, on the device.
    parameters : list of nn.Parameter
        The network's trained parameters.

    Raises
    ------
    TrainingError
        The client has no images.
    """

    def __init__(
        self, model: nn.Module, data: ImageSet, local: LocalRound, seed: int, device: torch.device | str
    ) -> None:
        if len(data) == 0:
            raise TrainingError(f"round {local.round}: this client has no images to train on")
        self.device = torch.device(device)
        model.to(self.device).train()
        self._start, self._cpu_start = time.perf_counter(), time.process_time()
        self.generator = torch.Generator(device=self.device).manual_seed(seed)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._seed, self._flip = seed, local.settings.flip
        self._data, self._labels = data, np.asarray(data.labels)

    @contextlib.contextmanager
    def seeded(self) -> Iterator[None]:
        """Seed torch's global generators (used by dropout) and restore their state afterwards."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self._seed)
            yield

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the images [B, C, H, W], each mirrored with probability 1/2 under ``flip``, and labels [B]."""
        images = self._data.fetch(indices).to(self.device, non_blocking=True)
        if self._flip:
            mirrored = torch.rand(len(indices), generator=self.generator, device=self.device) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images, torch.from_numpy(self._labels[indices]).to(self.device, non_blocking=True)

    def result(self, steps: int, loss: float, lr_sum: float) -> LocalResult:
        """Return the training's result; its times end now."""
        return LocalResult(
            steps=steps,
            samples=len(self._data),
            loss=loss,
            lr_sum=lr_sum,
            seconds=time.perf_counter() - self._start,
            cpu_seconds=time.process_time() - self._cpu_start,
        )


def _autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    wanted = precision == "bf16" or (
        precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    return torch.autocast(device.type, dtype=torch.bfloat16) if wanted else contextlib.nullcontext()


@contextlib.contextmanager
def _full_convolution_speed(device: torch.device) -> Iterator[None]:
    """Enable cuDNN's benchmark of convolution kernels: all batches but an epoch's last have one shape."""
    if device.type != "cuda":
        yield
        return
    previous = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = previous
