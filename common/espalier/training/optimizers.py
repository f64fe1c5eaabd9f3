"""How a client applies its gradients: Adam that goes on from round to round, or SGD that starts anew."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import MutableMapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from espalier.models.presets import task_of
from espalier.training.objectives import LocalRound

#: Step sizes that ``learning-rate=0`` means.
RATES = {"adam": 0.001, "sgd": 0.05}

#: Keys of what Adam keeps in a client's state.
_MEAN, _SQUARE, _STEPS, _MOMENT_STEPS, _SHAPES = (
    f"trainer/{name}" for name in ("exp_avg", "exp_avg_sq", "steps", "moment_steps", "shapes")
)


class LocalOptimizer(ABC):
    """Applies the gradients of one round."""

    @abstractmethod
    def step(self) -> float:
        """Apply the gradients and drop them; return the learning rate used."""

    @abstractmethod
    def store(self, state: MutableMapping[str, np.ndarray]) -> None:
        """Put what the client's next round goes on from into its state."""


def optimizer_kind(local: LocalRound) -> str:
    """Return "adam" or "sgd": the method's demand, else the run's, else Adam for diffusion and SGD else."""
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
        Settings, round, and the state Adam goes on from.
    """
    return (Adam if optimizer_kind(local) == "adam" else SGD)(parameters, local)


class SGD(LocalOptimizer):
    """SGD without warm-up; its momentum buffer is new in every round, as in the papers on federated SGD."""

    def __init__(self, parameters: Sequence[nn.Parameter], local: LocalRound) -> None:
        settings = local.settings
        self._rate = learning_rate(local)
        self._optimizer = torch.optim.SGD(
            parameters, lr=self._rate, momentum=settings.momentum, weight_decay=settings.weight_decay
        )

    def step(self) -> float:
        """Apply the gradients and drop them; return the learning rate used."""
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return self._rate

    def store(self, state: MutableMapping[str, np.ndarray]) -> None:
        """Keep nothing."""


class Adam(LocalOptimizer):
    """Adam with warm-up, its moments in two flat buffers that go to and from a state in one piece.

    Default betas. The learning rate rises linearly over the client's first ``warmup_steps`` steps (counted
    over its rounds), then stays. With ``keep_optimizer`` the moments go on from the client's former round.
    Where the parameters' shapes changed since (pruning), moments and warm-up start anew.
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
        kept = same and self._keep and _MEAN in state and _SQUARE in state
        self._moment_steps = int(state[_MOMENT_STEPS]) if kept else 0
        self._mean, self._square = (
            _moments(state[key], device, own=local.own_state)
            if kept
            else torch.zeros(size, dtype=torch.float32, device=device)
            for key in (_MEAN, _SQUARE)
        )
        self._optimizer = torch.optim.Adam(
            parameters,
            lr=self._peak,
            weight_decay=settings.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        # Cut up by one call each: a call a parameter is milliseconds a round, and on a GPU a copy to it.
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


def _moments(kept: np.ndarray, device: torch.device, *, own: bool) -> Tensor:
    """Return kept moments as a buffer to go on in; `kept` itself where it is the round's own and on its device."""
    array = np.asarray(kept, dtype=np.float32)
    # The way to another device is a copy by itself.
    if not array.flags.writeable or (device.type == "cpu" and not own):
        array = array.copy()
    return torch.from_numpy(array).to(device)
