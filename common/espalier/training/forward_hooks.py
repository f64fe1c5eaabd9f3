"""What terms beside a base loss share: its pass over a batch, means over a round, networks with one answer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from espalier.models.layers import Classifier
from espalier.training.objectives import TrainingError


class Overheard:
    """What a module takes or gives in a pass that somebody else makes."""

    def __init__(self) -> None:
        self._hook: RemovableHandle | None = None
        self._value: Any = None

    def listen(self, module: nn.Module, *, inputs: bool = False) -> None:
        """Catch a module's output, or its first input, from now on."""
        self.release()

        def caught(heard: nn.Module, arguments: tuple[Any, ...], output: Any = None) -> None:
            # A deep copy of the module carries the hook along.
            if heard is module:
                self._value = arguments[0] if inputs else output

        if inputs:
            self._hook = module.register_forward_pre_hook(caught)
        else:
            self._hook = module.register_forward_hook(caught)

    def take(self) -> Any:
        """Return what was caught, once."""
        if self._value is None:
            raise RuntimeError("this term comes behind the base loss in the sum")
        value, self._value = self._value, None
        return value

    def release(self) -> None:
        """Stop listening."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._value = None


class RunningMean:
    """The mean of a term's values over a round; one synchronisation with the device, at the end."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._count = 0

    def add(self, value: Tensor) -> None:
        """Count a batch's value; not while somebody only measures."""
        if torch.is_grad_enabled():
            value = value.detach().double()
            self._total = value if self._total is None else self._total + value
            self._count += 1

    def report(self, name: str) -> dict[str, float]:
        """Return the mean by name; nothing where there was no value."""
        return {} if self._total is None else {name: float(self._total) / self._count}


def classifier(model: nn.Module, method: str) -> Classifier:
    """Return a model as the classifier it is; a U-Net is refused."""
    if isinstance(model, Classifier):
        return model
    raise TrainingError(f"{method} is for classifiers; a {type(model).__name__} has no classes")


def single_answer(answer: Tensor | list[Tensor], method: str) -> Tensor:
    """Return a network's logits in single precision; one with several answers is refused."""
    if isinstance(answer, Tensor):
        return answer.float()
    raise TrainingError(f"{method} takes networks with one answer; choose a model without exits or members")
