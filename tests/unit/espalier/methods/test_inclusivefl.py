"""InclusiveFL: the loss of the last exit."""

from __future__ import annotations

import pytest
from torch import Generator
from torch.nn import functional

from espalier.methods.inclusivefl import LastExit
from tests.support.terms import batch, gradients, local_round, network


def test_the_last_exit_alone_leaves_the_others_without_gradient() -> None:
    model, (images, labels) = network("depth-cnn"), batch()
    term = LastExit()
    term.begin(model, local_round(model, "depth-cnn"))
    expected = functional.cross_entropy(model.exits(images)[-1], labels).item()
    assert term.loss(model, images, labels, Generator()).item() == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients(term, model).items():
        silent = name.startswith(("exit1.", "exit2."))
        assert bool((gradient == 0).all()) == silent, name
