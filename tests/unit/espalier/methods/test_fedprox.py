"""FedProx: the proximal term."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from espalier.methods.fedprox import ProximalTerm
from tests.support.terms import gradients, local_round, moved, network

NOTHING = torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64), Generator()


def test_the_gradient_of_the_proximal_term() -> None:
    model = network("cnn-bn")
    local = local_round(model)
    term = ProximalTerm(0.3)
    term.begin(moved(model), local)
    found = gradients(term, model)
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name], 0.3 * (parameter - local.received[name]), atol=1e-7)
    # The norm is squared, so twice the distance has twice the gradient; un-squared it would not change.
    near = torch.cat([g.flatten() for g in found.values()]).norm()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(local.received[name] + 2 * (parameter - local.received[name]))
    far = torch.cat([g.flatten() for g in gradients(term, model).values()]).norm()
    assert (far / near).item() == pytest.approx(2.0, rel=1e-5)


def test_the_proximal_term_ignores_running_statistics() -> None:
    model = network("cnn-bn")
    local = local_round(model)
    term = ProximalTerm(2.0)
    term.begin(model, local)
    model.get_buffer("norm1.running_mean").fill_(7.0)
    assert term.loss(model, *NOTHING).item() == 0.0
    with torch.no_grad():
        model.get_parameter("norm1.weight")[0] += 3.0
    assert term.loss(model, *NOTHING).item() == pytest.approx(2.0 / 2 * 9)
