"""MOON's model-contrastive term, on classifiers and U-Nets."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from espalier.methods.moon import (
    HEAD,
    ModelContrastiveTerm,
    contrastive_loss,
    initial_head,
    mid_features,
    mid_width,
)
from espalier.methods.run_config import RunConfig
from espalier.models.initial import initial_bases, initial_model
from espalier.models.pruning import prune
from espalier.tasks.classification import CrossEntropy
from espalier.tasks.diffusion import DDPMLoss
from espalier.training.objectives import LocalRound, Objective, TrainingError
from espalier_client.trainer import train_local
from tests.support.terms import Images, batch, gradients, local_round, moved, network, received, result


def unet() -> Any:
    return initial_model(RunConfig(model="unet-tiny", seed=1), (1, 8, 8))


def begun(model: Any, base: Objective, preset: str, **known: Any) -> tuple[Objective, LocalRound]:
    objective, local = base + ModelContrastiveTerm(2.0, 0.5), local_round(model, preset, **known)
    objective.begin(model, local)
    return objective, local


def former(model: nn.Module) -> dict[str, np.ndarray]:
    return {"moon/" + name: tensor.numpy() for name, tensor in received(model).items()}


def test_the_contrast_by_hand() -> None:
    z = torch.tensor([[3.0, 4.0]])
    value = contrastive_loss(z, torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, -2.0]]), 0.5)
    # cosines 0.6 and -0.8, over a temperature of 0.5
    assert value.item() == pytest.approx(-math.log(math.exp(1.2) / (math.exp(1.2) + math.exp(-1.6))))


def test_only_the_network_in_training_gets_a_gradient() -> None:
    z, *others = (torch.randn(4, 3, generator=Generator().manual_seed(s)).requires_grad_() for s in (1, 2, 3))
    torch.autograd.backward(contrastive_loss(z, others[0], others[1], 0.5))
    assert z.grad is not None
    assert z.grad.abs().sum() > 0
    assert all(other.grad is None for other in others)


def test_in_its_first_round_the_gradient_is_cross_entropys() -> None:
    model = network("cnn", projection=16)
    objective, _ = begun(model, CrossEntropy(), "cnn")
    images, labels = batch()
    value = objective.loss(model, images, labels, Generator()).item()
    plain = network("cnn", projection=16)
    alone = functional.cross_entropy(plain(images), labels).item()
    assert value == pytest.approx(alone + 2.0 * math.log(2), rel=1e-5)
    # Away from the received network, too: the term is 0 in the whole round, not just at its start.
    moved(model)
    moved(plain)
    with_term = gradients(objective, model)
    for name, gradient in gradients(CrossEntropy(), plain).items():
        assert torch.allclose(with_term[name], gradient, atol=1e-7), name


def test_the_term_compares_received_and_previous_network() -> None:
    model = network("cnn-bn", projection=16)
    own: Any = moved(network("cnn-bn", projection=16), seed=8)
    given = copy.deepcopy(model)
    objective, _ = begun(model, CrossEntropy(), "cnn-bn", state=former(own))
    moved(model, seed=5)
    images, labels = batch()
    value = objective.loss(model, images, labels, Generator()).item()
    model.train()
    with torch.no_grad():
        z = copy.deepcopy(model).project(images)
        z_global, z_former = given.eval().project(images), own.eval().project(images)

        def cosine(a: Tensor, b: Tensor) -> Tensor:
            return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()

        up, down = (torch.exp(cosine(z, other) / 0.5) for other in (z_global, z_former))
        expected = -torch.log(up / (up + down)).mean().item() * 2.0
        expected += functional.cross_entropy(copy.deepcopy(model)(images), labels).item()
    assert value == pytest.approx(expected, rel=1e-4)


def test_frozen_networks_are_in_eval_mode() -> None:
    model = network("cnn-bn", projection=16)
    objective, _ = begun(
        model, CrossEntropy(), "cnn-bn", state=former(moved(network("cnn-bn", projection=16)))
    )
    images, labels = batch()
    value = objective.loss(model, images, labels, Generator())
    assert model.get_buffer("norm1.num_batches_tracked") == 1
    again = network("cnn-bn", projection=16)
    again(images)
    assert torch.equal(model.get_buffer("norm1.running_mean"), again.get_buffer("norm1.running_mean"))
    assert value.requires_grad


def test_the_previous_network_is_the_clients_own() -> None:
    state = dict[str, np.ndarray]()
    model, trained = network("cnn", projection=16), np.zeros((10, 16))
    for number in (1, 2):
        model = network("cnn", projection=16)
        objective, local = begun(model, CrossEntropy(), "cnn", state=state, round_=number)
        train_local(model, objective, Images(20), local, seed=number, device="cpu")
        # What the server reads differs (a codec): the client still compares with what it trained itself.
        rounded = {n: torch.zeros_like(t) for n, t in model.state_dict().items()}
        objective.end(model, result(), rounded)
        assert set(state) == {"moon/" + name for name in model.state_dict()}
        for name, tensor in model.state_dict().items():
            assert np.array_equal(state["moon/" + name], tensor.numpy())
        assert not np.array_equal(state["moon/classifier.weight"], trained)
        trained = state["moon/classifier.weight"]
    # The state is a copy: training on does not reach into it.
    moved(model)
    assert np.array_equal(state["moon/classifier.weight"], trained)


def test_a_previous_network_of_another_shape_is_ignored() -> None:
    model = network("cnn", projection=16)
    objective, local = begun(model, CrossEntropy(), "cnn", state=former(network("cnn", projection=8)))
    with_term = gradients(objective, model)
    for name, gradient in gradients(CrossEntropy(), network("cnn", projection=16)).items():
        assert torch.allclose(with_term[name], gradient, atol=1e-7)
    objective.end(model, result(), received(model))
    assert local.state["moon/projection.3.weight"].shape == (16, 64)


def test_a_network_with_exits_is_compared_at_its_deepest_one() -> None:
    model = network("depth-cnn")
    objective, _ = begun(model, CrossEntropy(), "depth-cnn", state=former(moved(network("depth-cnn"))))
    with_term, alone = gradients(objective, model), gradients(CrossEntropy(), network("depth-cnn"))
    term = {name: (gradient - alone[name]).abs().max() for name, gradient in with_term.items()}
    assert term["stage3.0.weight"] > 1e-4
    assert all(value < 1e-6 for name, value in term.items() if name.startswith(("exit1.", "exit2.")))


def test_the_term_comes_behind_the_base_loss() -> None:
    model = network("cnn")
    objective = ModelContrastiveTerm(1.0, 0.5) + CrossEntropy()
    objective.begin(model, local_round(model))
    with pytest.raises(RuntimeError, match="after the base loss"):
        objective.loss(model, *batch(), Generator())


def test_the_hooks_are_gone_in_the_end() -> None:
    model = network("cnn")
    objective, _ = begun(model, CrossEntropy(), "cnn")
    assert len(model.classifier._forward_pre_hooks) == 1
    objective.begin(model, local_round(model))
    assert len(model.classifier._forward_pre_hooks) == 1
    objective.end(model, result(), received(model))
    assert not model.classifier._forward_pre_hooks


def test_the_lower_half_of_a_unet_is_what_the_whole_computes() -> None:
    models: list[Any] = [unet().eval(), prune(unet(), 0.2).eval()]
    for model in models:
        caught: list[Tensor] = []
        handle = model.mid_block.register_forward_hook(lambda _, __, out: caught.append(out))  # noqa: B023
        images, times = batch()[0], torch.arange(6) * 100
        with torch.no_grad():
            model(images, times)
            handle.remove()
            assert torch.equal(mid_features(model, images, times), caught[0])
        assert caught[0].shape[1] == mid_width(model)


def test_on_a_unet_the_first_round_is_the_ddpm_losss() -> None:
    model = unet()
    objective, _ = begun(model, DDPMLoss(), "unet-tiny")
    plain = DDPMLoss()
    plain.begin(model, local_round(model, "unet-tiny"))
    with_term, alone = gradients(objective, model), gradients(plain, model)
    for name, gradient in alone.items():
        assert torch.allclose(with_term[name], gradient, atol=1e-7), name


def test_on_a_unet_the_term_uses_the_noised_images() -> None:
    model, own = unet().eval(), moved(unet(), 0.02).eval()
    head = initial_head(mid_width(model), 2023)
    state = former(own) | {"moon/head/" + name: array + np.float32(0.05) for name, array in head.items()}
    objective, _ = begun(model, DDPMLoss(), "unet-tiny", state=state)
    given = copy.deepcopy(model)
    moved(model, 0.01, seed=9)
    fed: list[tuple[Any, ...]] = []
    model.register_forward_pre_hook(lambda _, arguments: fed.append(arguments))
    images, labels = batch()
    value = objective.loss(model, images, labels, Generator().manual_seed(4)).item()
    alone = DDPMLoss()
    alone.begin(model, local_round(model, "unet-tiny"))
    base = alone.loss(model, images, labels, Generator().manual_seed(4)).item()

    def z(network: nn.Module, shift: float) -> Tensor:
        w1, b1, w2, b2 = (torch.tensor(head[n]) + shift for n in ("0.weight", "0.bias", "2.weight", "2.bias"))
        pooled = mid_features(network, fed[0][0], fed[0][1]).mean((2, 3))
        return functional.relu(pooled @ w1.T + b1) @ w2.T + b2

    with torch.no_grad():
        expected = contrastive_loss(z(model, 0.0), z(given, 0.0), z(own, 0.05), 0.5).item() * 2.0
    assert expected > 1e-3
    assert value - base == pytest.approx(expected, rel=1e-3)


def test_the_projection_head_is_received_trained_and_sent() -> None:
    model = unet()
    given = {name: array + np.float32(0.01) for name, array in initial_head(mid_width(model), 7).items()}
    state = dict[str, np.ndarray]()
    for number in (1, 2):
        moved(model, 0.01, seed=number)  # The servers' model is not what the client made of its last one.
        objective = DDPMLoss() + ModelContrastiveTerm(2.0, 0.5)
        local = local_round(model, "unet-tiny", number, sections={HEAD: given}, state=state, warmup_steps=0)
        train_local(model, objective, Images(8), local, seed=number, device="cpu")
        [(section, sent)] = objective.extra().items()
        assert section == HEAD
        assert {n: a.shape for n, a in sent.items()} == {n: a.shape for n, a in given.items()}
        change = max(np.abs(sent[n] - given[n]).max() for n in given)
        # In round 1 the term has no gradient; in round 2 the head learns with the network.
        assert (change > 1e-5) == (number == 2)
        objective.end(model, result(), received(model))
        assert {n for n in state if n.startswith("moon/head/")} == {"moon/head/" + n for n in given}


def test_initial_heads_are_the_same_at_every_client() -> None:
    torch.manual_seed(3)
    one = initial_head(40, 5)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))
    assert all(np.array_equal(one[n], a) for n, a in initial_head(40, 5).items())
    assert not np.array_equal(one["0.weight"], initial_head(40, 6)["0.weight"])
    assert one["0.weight"].shape == (40, 40)
    assert one["2.weight"].shape == (256, 40)


def test_what_cannot_be_compared_is_refused() -> None:
    bases = initial_bases(RunConfig(model="cnn"), (1, 8, 8), 10, 0.5, [0, 1])
    with pytest.raises(TrainingError, match="no representation"):
        ModelContrastiveTerm(1.0, 0.5).begin(bases, local_round(bases))
    model = unet()
    with pytest.raises(TrainingError, match="does not fit"):
        ModelContrastiveTerm(1.0, 0.5).begin(
            model, local_round(model, "unet-tiny", sections={HEAD: initial_head(7, 1)})
        )
