"""Local optimisers: Adam whose moments persist between rounds, and SGD that starts new in every round."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import MutableMapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from espalier.models.presets import task_of
from espalier.training.objectives import LocalRound

#: Default step sizes, for ``learning-rate=0``.
RATES = {"adam": 0.001, "sgd": 0.05}

#: Keys of Adam's arrays in a client's state.
_MEAN, _SQUARE, _STEPS, _MOMENT_STEPS, _SHAPES = (
    f"trainer/{name}" for name in ("exp_avg", "exp_avg_sq", "steps", "moment_steps", "shapes")
)


class LocalOptimizer(ABC):
    """Applies gradients in one round."""

    @abstractmethod
    def step(self) -> float:
        """Apply and clear the gradients; return the learning rate used."""

    @abstractmethod
    def store(self, state: MutableMapping[str, np.ndarray]) -> None:
        """Write what the client's next round continues from into its state."""


def optimizer_kind(local: LocalRound) -> str:
    """Return "adam" or "sgd": required by the method, set for the run, or Adam for diffusion and SGD otherwise."""
    if local.optimizer:
        return local.optimizer
    if local.settings.optimizer != "auto":
        return local.settings.optimizer
    return "adam" if task_of(local.settings.model) == "diffusion" else "sgd"


def learning_rate(local: LocalRound) -> float:
    """Return the round's step size after warm-up: ``learning-rate * learning-rate-decay^(round - 1)``."""
    settings = local.settings
    rate = settings.learning_rate or RATES[optimizer_kind(local)]
    return rate * settings.learning_rate_decay ** (local.round - 1)


def create_optimizer(parameters: Sequence[nn.Parameter], local: LocalRound) -> LocalOptimizer:
    """Return the optimiser of a round.

    Parameters
    ----------
    parameters : sequence of nn.Parameter
        What is trained, all on one device.
    local : LocalRound
        Settings, round, and the state that Adam continues from.
    """
    return (Adam if optimizer_kind(local) == "adam" else SGD)(parameters, local)


class SGD(LocalOptimizer):
    """SGD without warm-up; its momentum buffer is reset in every round, as in the papers on federated SGD."""

    def __init__(self, parameters: Sequence[nn.Parameter], local: LocalRound) -> None:
        settings = local.settings
        self._rate = learning_rate(local)
        self._optimizer = torch.optim.SGD(
            parameters, lr=self._rate, momentum=settings.momentum, weight_decay=settings.weight_decay
        )

    def step(self) -> float:
        """Apply and clear the gradients; return the learning rate used."""
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return self._rate

    def store(self, state: MutableMapping[str, np.ndarray]) -> None:
        """Store nothing."""


class Adam(LocalOptimizer):
    """Adam with warm-up, its moments in two flat buffers that are stored as one array each.

    Default betas. The learning rate rises linearly over the client's first ``warmup_steps`` steps, counted over
    all rounds, and is constant afterwards. With ``keep_optimizer`` the moments continue from the client's previous
    round. If the parameters' shapes have changed since (pruning), moments and warm-up are reset.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], local: LocalRound) -> None:
        settings = local.settings
        self._peak, self._warmup = learning_rate(local), settings.warmup_steps
        self._keep = settings.keep_optimizer
        self._shapes = np.frombuffer(
            hashlib.sha256(repr([tuple(p.shape) for p in parameters]).encode()).digest(), dtype=np.uint8
        )
        state, size, device = local.state, sum(p.numel() for p in parameters), parameters[0].device
        same = _SHAPES in state and np.array_equal(state[_SHAPES], self._shapes)
        self._steps = int(state[_STEPS]) if same and _STEPS in state else 0
        resumed = same and self._keep and _MEAN in state and _SQUARE in state
        self._moment_steps = int(state[_MOMENT_STEPS]) if resumed else 0
        self._mean, self._square = (
            _moments(state[key], device, own=local.own_state)
            if resumed
            else torch.zeros(size, dtype=torch.float32, device=device)
            for key in (_MEAN, _SQUARE)
        )
        self._optimizer = torch.optim.Adam(
            parameters,
            lr=self._peak,
            weight_decay=settings.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        # One split per buffer: a call per parameter takes milliseconds per round, and on a GPU a copy to it.
        sizes = [p.numel() for p in parameters]
        steps = torch.full((len(sizes),), float(self._moment_steps), device=device).unbind()
        means, squares = torch.split(self._mean, sizes), torch.split(self._square, sizes)
        for parameter, step, mean, square in zip(parameters, steps, means, squares, strict=True):
            self._optimizer.state[parameter] = {
                "step": step,
                "exp_avg": mean.view_as(parameter),
                "exp_avg_sq": square.view_as(parameter),
            }

    def step(self) -> float:
        """Apply and clear the gradients; return the learning rate used."""
        self._steps += 1
        self._moment_steps += 1
        rate = self._peak * min(1.0, self._steps / max(1, self._warmup))
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return rate

    def store(self, state: MutableMapping[str, np.ndarray]) -> None:
        """Write what the client's next round continues from into its state."""
        state[_SHAPES], state[_STEPS] = self._shapes, np.array(self._steps, dtype=np.int64)
        if self._keep:
            state[_MEAN], state[_SQUARE] = self._mean.cpu().numpy(), self._square.cpu().numpy()
            state[_MOMENT_STEPS] = np.array(self._moment_steps, dtype=np.int64)
        else:
            for key in (_MEAN, _SQUARE, _MOMENT_STEPS):
                state.pop(key, None)


def _moments(stored: np.ndarray, device: torch.device, *, own: bool) -> Tensor:
    """Return stored moments as a buffer to update; the array itself if the round owns it and it is on the device."""
    array = np.asarray(stored, dtype=np.float32)
    # Moving to another device copies in any case.
    if not array.flags.writeable or (device.type == "cpu" and not own):
        array = array.copy()
    return torch.from_numpy(array).to(device)
