"""Objectives compose with +."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from espalier.training.objectives import LocalResult, LocalRound, Objective

IMAGES, LABELS = torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def result() -> LocalResult:
    return LocalResult(steps=1, samples=1, loss=0.0, lr_sum=0.0, seconds=0.0)


class Term(Objective):
    def __init__(self, name: str, value: float, log: list[str]) -> None:
        self.name, self.value, self.log = name, value, log

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        self.log.append(f"begin {self.name}")

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        return torch.tensor(self.value)

    def after_backward(self, model: nn.Module) -> None:
        self.log.append(f"backward {self.name}")

    def end(self, model: nn.Module, result: LocalResult, sent: Mapping[str, Tensor]) -> dict[str, float]:
        return {self.name: self.value}


def test_terms_add_up_and_act_in_order() -> None:
    log: list[str] = []
    objective = Term("a", 1.0, log) + (Term("b", 2.0, log) + Term("c", 4.0, log))
    settings: Any = SimpleNamespace()
    net = nn.Identity()
    objective.begin(net, LocalRound(settings, 1))
    assert objective.loss(net, IMAGES, LABELS, seeded()).item() == 7.0
    objective.after_backward(net)
    assert log == [f"{step} {name}" for step in ("begin", "backward") for name in "abc"]
    assert objective.end(net, result(), {}) == {"a": 1.0, "b": 2.0, "c": 4.0}


def test_a_bare_objective_says_that_it_has_no_loss() -> None:
    with pytest.raises(NotImplementedError):
        Objective().loss(nn.Identity(), IMAGES, LABELS, seeded())
