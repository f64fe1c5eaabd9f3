"""A client's local training: E epochs of Adam on one objective, from seeded generators only."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from common.errors import ConfigError, EspalierError
from common.learning.objectives import LocalResult, LocalRound, Objective

if TYPE_CHECKING:
    from common.data.imageset import ImageSet

#: Keys of what the trainer keeps in a client's state.
_MEAN, _SQUARE, _STEPS, _MOMENT_STEPS, _SHAPES = (
    f"trainer/{name}" for name in ("exp_avg", "exp_avg_sq", "steps", "moment_steps", "shapes")
)


class TrainingError(EspalierError):
    """Local training went wrong in a way that a setting can mend."""


def resolve_device(setting: str) -> torch.device:
    """Return the device a ``device`` setting means; "auto" is CUDA, then MPS, then the CPU.

    Raises
    ------
    ConfigError
        The setting names no device, or one this machine does not have.
    """
    if setting == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(setting)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("nothing can be trained there")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device: {setting!r} cannot be used here ({reason}); use auto or cpu") from None
    return device


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

    Adam with default betas; the learning rate rises linearly over the client's first ``warmup_steps`` steps
    (counted over its rounds), then stays; gradients are clipped to ``clip_norm``; every epoch visits every
    image once in a new order. With ``keep_optimizer`` Adam's moments go on from the client's former round.
    Where the model's shapes changed since (pruning), moments and warm-up start anew.

    Parameters
    ----------
    model : nn.Module
        Holds the received weights; moved to `device` and trained in place.
    objective : Objective
        What to minimise.
    data : ImageSet
        The client's own images.
    local : LocalRound
        Settings and state; the state is replaced at the end, and only if training went well.
    seed : int
        Seed of order, noise and dropout; the result depends on nothing else that is random.
    device : torch.device or str
        Where to train. bf16 autocast is used on CUDA when ``precision`` is auto, and wherever it is "bf16".

    Returns
    -------
    LocalResult
        Steps, samples, mean loss, sum of learning rates, seconds, and the objective's metrics.

    Raises
    ------
    TrainingError
        The client has no images, or the loss is not finite.
    """
    settings, count = local.settings, len(data)
    if count == 0:
        raise TrainingError(f"round {local.round}: this client has no images to train on")
    device = torch.device(device)
    model.to(device).train()
    started = time.perf_counter()
    generator = torch.Generator(device=device).manual_seed(seed)
    order = np.random.default_rng(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = _Adam(parameters, local)
    labels = np.asarray(data.labels)
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    lr_sum, steps = 0.0, 0
    with _seeded(seed, device), _full_convolution_speed(device):
        objective.begin(model, local)
        for epoch in range(1, settings.local_epochs + 1):
            indices = order.permutation(count)
            for start in range(0, count, settings.batch_size):
                chosen = indices[start : start + settings.batch_size]
                images = data.fetch(chosen).to(device, non_blocking=True)
                if settings.flip:
                    mirrored = torch.rand(len(chosen), generator=generator, device=device) < 0.5
                    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
                batch_labels = torch.from_numpy(labels[chosen]).to(device, non_blocking=True)
                with _autocast(settings.precision, device):
                    loss = objective.loss(model, images, batch_labels, generator)
                loss.backward()  # type: ignore[no-untyped-call]
                objective.after_backward(model)
                if settings.clip_norm > 0:
                    nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
                lr_sum += adam.step()
                loss_sum += loss.detach() * len(chosen)
                steps += 1
            # One synchronisation an epoch: an update made from a NaN must never leave the client.
            if not math.isfinite(loss_sum.item()):
                raise TrainingError(
                    f"the loss is not finite in epoch {epoch} of round {local.round}; "
                    "lower learning-rate, or set clip-norm=1 or precision=fp32"
                )
        result = LocalResult(
            steps=steps,
            samples=count,
            loss=loss_sum.item() / (count * settings.local_epochs),
            lr_sum=lr_sum,
            seconds=time.perf_counter() - started,
        )
        result.metrics = objective.end(model, result)
    adam.store(local.state)
    return result


class _Adam:
    """Adam with warm-up, its moments in two flat buffers that go to and from a state in one piece."""

    def __init__(self, parameters: list[nn.Parameter], local: LocalRound) -> None:
        settings = local.settings
        self._peak, self._warmup = settings.learning_rate, settings.warmup_steps
        self._keep = settings.keep_optimizer
        self._shapes = np.frombuffer(
            hashlib.sha256(repr([tuple(p.shape) for p in parameters]).encode()).digest(), dtype=np.uint8
        )
        state, size, device = local.state, sum(p.numel() for p in parameters), parameters[0].device
        same = _SHAPES in state and np.array_equal(state[_SHAPES], self._shapes)
        self._steps = int(state[_STEPS]) if same and _STEPS in state else 0
        kept = same and self._keep and _MEAN in state and _SQUARE in state
        self._moment_steps = int(state[_MOMENT_STEPS]) if kept else 0
        self._mean, self._square = (
            torch.from_numpy(np.array(state[key], dtype=np.float32)).to(device)
            if kept
            else torch.zeros(size, dtype=torch.float32, device=device)
            for key in (_MEAN, _SQUARE)
        )
        self._optimizer = torch.optim.Adam(parameters, lr=self._peak, fused=device.type in ("cpu", "cuda"))
        offset = 0
        for parameter in parameters:
            end = offset + parameter.numel()
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(self._moment_steps), device=device),
                "exp_avg": self._mean[offset:end].view_as(parameter),
                "exp_avg_sq": self._square[offset:end].view_as(parameter),
            }
            offset = end

    def step(self) -> float:
        """Apply the gradients and drop them; return the learning rate used."""
        self._steps += 1
        self._moment_steps += 1
        rate = self._peak * min(1.0, self._steps / max(1, self._warmup))
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return rate

    def store(self, state: MutableMapping[str, np.ndarray]) -> None:
        """Put what the client's next round goes on from into its state."""
        state[_SHAPES], state[_STEPS] = self._shapes, np.array(self._steps, dtype=np.int64)
        if self._keep:
            state[_MEAN], state[_SQUARE] = self._mean.cpu().numpy(), self._square.cpu().numpy()
            state[_MOMENT_STEPS] = np.array(self._moment_steps, dtype=np.int64)
        else:
            for key in (_MEAN, _SQUARE, _MOMENT_STEPS):
                state.pop(key, None)


def _autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    wanted = precision == "bf16" or (
        precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    return torch.autocast(device.type, dtype=torch.bfloat16) if wanted else contextlib.nullcontext()


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators (dropout draws from them) and give them back as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _full_convolution_speed(device: torch.device) -> Iterator[None]:
    """Let cuDNN measure its convolution kernels: every batch but the last of an epoch has one shape."""
    if device.type != "cuda":
        yield
        return
    former = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = former
