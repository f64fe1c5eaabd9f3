"""FedKTL: ArcFace, prototypes, the transfer task and the alignment."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from espalier.errors import WireError
from espalier.methods.fedktl.alignment import FeatureTransformer, align, class_means, mmd
from espalier.methods.fedktl.client import (
    ArcFace,
    EtfHead,
    KnowledgeTransfer,
    UnitPrototypes,
    margin_logits,
    simplex_etf,
    transfer_head,
)
from espalier.training.objectives import TrainingError
from espalier.wire.class_table import UNIT_PROTOTYPE
from espalier.wire.pairs import PAIRS, Pairs, to_pixels
from espalier_client.trainer import train_local
from tests.support.terms import Images, batch, gradients, local_round, moved, network, received, result

CLASSES = 10


@pytest.mark.parametrize(("classes", "dimension"), [(2, 2), (10, 10), (10, 17), (100, 100)])
def test_the_simplex_is_equiangular(classes: int, dimension: int) -> None:
    frame = simplex_etf(classes, dimension, 3).astype(np.float64)
    assert frame.shape == (classes, dimension)
    cosines = frame @ frame.T
    expected = np.where(np.eye(classes, dtype=bool), 1.0, -1.0 / (classes - 1))
    np.testing.assert_allclose(cosines, expected, atol=1e-6)
    np.testing.assert_allclose(frame.sum(0), 0.0, atol=1e-5)


def test_the_frame_depends_on_the_runs_seed_only() -> None:
    np.testing.assert_array_equal(simplex_etf(7, 7, 1), simplex_etf(7, 7, 1))
    assert np.abs(simplex_etf(7, 7, 1) - simplex_etf(7, 7, 2)).max() > 0.1
    with pytest.raises(ValueError, match="5 vectors in 4"):
        simplex_etf(5, 4, 1)


def test_the_head_gives_cosines() -> None:
    head = EtfHead.of(CLASSES, 1)
    assert not list(head.parameters())
    outputs = torch.from_numpy(3.0 * simplex_etf(CLASSES, CLASSES, 1))
    np.testing.assert_allclose(head(outputs).diagonal(), 1.0, atol=1e-6)
    assert head(outputs).argmax(1).tolist() == list(range(CLASSES))
    assert torch.isfinite(head(torch.zeros(1, CLASSES))).all()


def reference_loss(cosines: np.ndarray, labels: list[int], margin: float, scale: float) -> float:
    """ArcFace in double precision, sample by sample."""
    losses = []
    for row, label in zip(cosines.astype(np.float64), labels, strict=True):
        theta = math.acos(row[label])
        own = (
            math.cos(theta + margin) if theta + margin <= math.pi else row[label] - margin * math.sin(margin)
        )
        logits = [scale * (own if c == label else value) for c, value in enumerate(row)]
        top = max(logits)
        losses.append(top + math.log(sum(math.exp(z - top) for z in logits)) - logits[label])
    return sum(losses) / len(losses)


def test_arcface_against_double_precision() -> None:
    cosines = np.random.default_rng(0).uniform(-0.99, 0.99, (64, CLASSES)).astype(np.float32)
    cosines[0, 0], cosines[1, 1] = -0.999, 0.999  # one beyond pi - m, one near 1
    labels = [row % CLASSES for row in range(64)]
    logits = margin_logits(torch.from_numpy(cosines), torch.tensor(labels))
    loss = functional.cross_entropy(logits.double(), torch.tensor(labels)).item()
    assert loss == pytest.approx(reference_loss(cosines, labels, 0.5, 64.0), rel=1e-5)
    others = ~np.eye(CLASSES, dtype=bool)[labels]
    np.testing.assert_allclose(logits.numpy()[others], 64 * cosines[others], rtol=1e-6)


@pytest.mark.parametrize("cosine", [-1.0, 1.0, -1.0000001, 1.0000001])
def test_arcface_has_finite_gradients_at_the_ends(cosine: float) -> None:
    cosines = torch.full((1, 3), 0.1)
    cosines[0, 1] = cosine
    cosines.requires_grad_()
    loss = functional.cross_entropy(margin_logits(cosines, torch.tensor([1])), torch.tensor([1]))
    torch.autograd.backward(loss)
    assert torch.isfinite(loss)
    assert cosines.grad is not None
    assert torch.isfinite(cosines.grad).all()


def test_the_own_logit_rises_with_the_cosine_everywhere() -> None:
    cosines = torch.linspace(-1, 1, 2001)[:, None].repeat(1, 2)
    own = margin_logits(cosines, torch.zeros(2001, dtype=torch.int64))[:, 0]
    assert (own.diff() > -1e-4).all()


def test_arcface_replaces_the_base_loss() -> None:
    model, local = network("cnn"), local_round(network("cnn"))
    objective = ArcFace()
    objective.begin(model, local)
    images, labels = batch()
    loss = objective.loss(model, images, labels, Generator()).item()
    with torch.no_grad():
        outputs = model(images).double().numpy()
    frame = simplex_etf(CLASSES, CLASSES, local.settings.seed).astype(np.float64)
    cosines = outputs / np.linalg.norm(outputs, axis=1, keepdims=True) @ frame.T
    assert loss == pytest.approx(reference_loss(cosines, labels.tolist(), 0.5, 64.0), rel=1e-4)


def test_a_network_learns_with_arcface() -> None:
    model, data = network("mlp"), Images(20)
    local = local_round(model, "mlp", local_epochs=60, batch_size=10, learning_rate=0.05)
    train_local(model, ArcFace(), data, local, seed=1, device="cpu")
    judge = nn.Sequential(model, EtfHead.of(CLASSES, local.settings.seed)).eval()
    assert (judge(data.images).argmax(1).numpy() == data.labels).mean() > 0.9


def test_unit_prototypes_by_class() -> None:
    data = Images(23)
    model = moved(network("cnn-bn"), 0.05)
    term = UnitPrototypes()
    objective = ArcFace() + term
    objective.begin(model, local_round(model, "cnn-bn", data=data, batch_size=5))
    assert objective.loss(model, *batch(), Generator()).isfinite()
    table = term.table()
    table.validate("c", kind=UNIT_PROTOTYPE, classes=CLASSES, dimension=CLASSES)
    judge = copy.deepcopy(model).eval()
    with torch.no_grad():
        outputs = judge(data.images).numpy().astype(np.float64)
    outputs /= np.linalg.norm(outputs, axis=1, keepdims=True)
    for label, vector in zip(table.labels, table.vectors, strict=True):
        mean = outputs[data.labels == label].mean(0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)
    # 10 classes: 400 B up at most
    assert sum(a.nbytes for arrays in objective.extra().values() for a in arrays.values()) == 400


def pairs(count: int, latent_dim: int = 5) -> Pairs:
    rng = np.random.default_rng(count)
    images = rng.uniform(-1, 1, (count, 1, 8, 8)).astype(np.float32)
    return Pairs(images, rng.normal(size=(count, latent_dim)).astype(np.float32))


def test_the_transfer_term_by_its_formula() -> None:
    model, given = network("cnn"), pairs(4)
    term, local = KnowledgeTransfer(50.0), local_round(model, sections={PAIRS: given.arrays()}, batch_size=10)
    term.begin(model, local)
    found = term.loss(model, *batch(), Generator().manual_seed(0)).item()
    head = transfer_head(model.classifier.in_features, 5, local.settings.seed)
    with torch.no_grad():
        answers = head(model.features(torch.from_numpy(given.images))).numpy()
    by_hand = ((answers - given.centroids) ** 2).mean()
    assert found == pytest.approx(50.0 * by_hand, rel=1e-5)
    assert term.end(model, result(), {})["transfer-loss"] == pytest.approx(by_hand, rel=1e-5)


def test_pairs_are_shuffled_and_cycled_by_minibatches() -> None:
    model, given = network("mlp"), pairs(7)
    seen: list[Tensor] = []

    def note(images: Tensor) -> Tensor:
        seen.append(images)
        return torch.zeros(len(images), 6, requires_grad=True)

    model.features = note
    term = KnowledgeTransfer(1.0)
    term.begin(model, local_round(model, "mlp", sections={PAIRS: given.arrays()}, batch_size=3))
    seen.clear()
    generator = Generator().manual_seed(1)
    for _ in range(6):
        term.loss(model, *batch(), generator)
    assert [len(images) for images in seen] == [3, 3, 1, 3, 3, 1]
    epochs = (torch.cat(seen[:3]), torch.cat(seen[3:]))
    orders = [[int(np.flatnonzero((given.images == i.numpy()).all((1, 2, 3)))[0]) for i in e] for e in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(7))
    assert orders[0] != orders[1]


def test_only_features_and_h_prime_learn_from_pairs() -> None:
    model = network("cnn")
    term = KnowledgeTransfer(1.0)
    term.begin(model, local_round(model, sections={PAIRS: pairs(4).arrays()}))
    found = gradients(term, model)
    assert not found["classifier.weight"].any()
    assert found["conv1.weight"].any()
    assert all(p.grad is not None and p.grad.any() for p in term.parameters())


def test_every_round_starts_from_the_same_h_prime() -> None:
    starts = []
    for round_ in (2, 3):
        model = network("cnn")
        term = KnowledgeTransfer(1.0)
        local = local_round(model, round_=round_, sections={PAIRS: pairs(4).arrays()})
        term.begin(model, local)
        starts.append([p.detach().clone() for p in term.parameters()])
        train_local(model, ArcFace() + term, Images(12), local, seed=round_, device="cpu")
        moved_by = [(p - s).abs().max().item() for p, s in zip(term.parameters(), starts[-1], strict=True)]
        assert min(moved_by) > 0
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))


@pytest.mark.parametrize(("mu", "aux"), [(50.0, {}), (0.0, pairs(4).arrays())])
def test_no_transfer_without_pairs_or_weight(mu: float, aux: dict[str, np.ndarray]) -> None:
    model = network("cnn")
    term = KnowledgeTransfer(mu)
    term.begin(model, local_round(model, sections={PAIRS: aux}))
    assert term.loss(model, *batch(), Generator()).item() == 0.0
    assert not list(term.parameters())
    assert term.end(model, result(), {}) == {}


def test_pixels_teach_what_floats_teach() -> None:
    model, given = network("cnn"), pairs(4)
    values = []
    for images in (given.images, to_pixels(given.images)):
        term = KnowledgeTransfer(1.0)
        term.begin(model, local_round(model, sections={PAIRS: Pairs(images, given.centroids).arrays()}))
        values.append(term.loss(model, *batch(), Generator().manual_seed(0)).item())
    assert values[0] == pytest.approx(values[1], rel=1e-2)
    assert values[0] != values[1]


def test_unfit_pairs_and_networks_are_refused() -> None:
    model = network("cnn")
    wrong = Pairs(np.zeros((2, 3, 8, 8), np.uint8), np.zeros((2, 5), np.float32))
    with pytest.raises(WireError, match=r"\[3, 8, 8\]"):
        KnowledgeTransfer(1.0).begin(model, local_round(model, sections={PAIRS: wrong.arrays()}))
    other = nn.Linear(3, 3)
    for term in (ArcFace(), UnitPrototypes(), KnowledgeTransfer(1.0)):
        with pytest.raises(TrainingError, match="for classifiers"):
            term.begin(other, local_round(other))


def normal(count: int, generator: Generator, latent_dim: int = 6) -> Tensor:
    return torch.randn(count, latent_dim, generator=generator)


def rows(clients: int = 6, classes: int = 4, dimension: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Return unit prototypes of several clients that lie around one direction a class."""
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(classes), clients)
    vectors = np.eye(classes, dimension)[labels] + 0.2 * rng.normal(size=(len(labels), dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), labels


def test_mmd_against_a_double_loop() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(5, 3)), 1 + 2 * rng.normal(size=(7, 3))

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return sum(math.exp(-float(((x - y) ** 2).sum()) / (2 * s)) for s in (10, 15, 20, 50))

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        return sum(kernel(p, q) for p in x for q in y) / (len(x) * len(y))

    expected = mean(a, a) + mean(b, b) - 2 * mean(a, b)
    found = mmd(torch.from_numpy(a), torch.from_numpy(b)).item()
    assert found == pytest.approx(expected, rel=1e-9)
    assert mmd(torch.from_numpy(a), torch.from_numpy(a)).item() == pytest.approx(0.0, abs=1e-12)


def test_class_means_leave_absent_classes_at_zero() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]])
    means = class_means(values, torch.tensor([2, 2, 0]), 4)
    assert means.tolist() == [[9.0, 9.0], [0.0, 0.0], [2.0, 3.0], [0.0, 0.0]]


def test_alignment_lowers_both_losses() -> None:
    prototypes, labels = rows()
    transformer = FeatureTransformer(4, 6, 1)

    def shifted(count: int, generator: Generator) -> Tensor:
        return 3 + normal(count, generator)

    done = align(transformer, prototypes, labels, shifted, generator=Generator().manual_seed(0), epochs=60)
    assert len(done.mmd) == len(done.separability) == 60
    assert np.mean(done.mmd[-5:]) < 0.5 * done.mmd[0]
    assert np.isfinite(done.mmd + done.separability).all()
    assert done.labels.tolist() == [0, 1, 2, 3]
    assert done.centroids.dtype == np.float32
    # By hand: F with the batch statistics of all rows.
    first, norm, _, last = cast(tuple[Any, Any, Any, Any], tuple(transformer))
    with torch.no_grad():
        hidden = first(torch.from_numpy(prototypes)).numpy().astype(np.float64)
        hidden = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
        hidden = hidden * norm.weight.numpy() + norm.bias.numpy()
        answers = np.maximum(hidden, 0) @ last.weight.numpy().T + last.bias.numpy()
    for label, centroid in zip(done.labels, done.centroids, strict=True):
        np.testing.assert_allclose(centroid, answers[labels == label].mean(0), atol=1e-4)


def test_separability_draws_the_classes_together() -> None:
    prototypes, labels = rows()
    spread = {}
    for weight in (0.0, 10.0):
        transformer = FeatureTransformer(4, 6, 1)
        done = align(
            transformer, prototypes, labels, normal, generator=Generator().manual_seed(0), weight=weight
        )
        spread[weight] = done.separability[-1]
    assert spread[10.0] < 0.2 * spread[0.0]


def test_absent_classes_have_no_centroid() -> None:
    prototypes, labels = rows(clients=3, classes=3)
    held = np.array([1, 5, 7])[labels]
    counts: list[int] = []

    def latents(count: int, generator: Generator) -> Tensor:
        counts.append(count)
        return normal(count, generator)

    done = align(
        FeatureTransformer(4, 6, 1), prototypes, held, latents, generator=Generator(), epochs=2, batch=4
    )
    assert done.labels.tolist() == [1, 5, 7]
    assert done.centroids.shape == (3, 6)
    assert counts == [4, 4, 4, 4]  # nine rows: the ninth would be a batch of its own


def test_a_single_row_aligns_nothing() -> None:
    prototypes, labels = rows(clients=1, classes=1)
    transformer = FeatureTransformer(4, 6, 1)
    before = received(transformer)
    done = align(transformer, prototypes, labels, normal, generator=Generator())
    assert (len(done.labels), done.centroids.shape, done.mmd) == (0, (0, 6), ())
    assert all(torch.equal(before[name], tensor) for name, tensor in transformer.state_dict().items())


def test_the_transformer_goes_on_from_round_to_round() -> None:
    prototypes, labels = rows()
    whole, resumed = FeatureTransformer(4, 6, 1), FeatureTransformer(4, 6, 2)
    align(whole, prototypes, labels, normal, generator=Generator().manual_seed(0), epochs=5)
    resumed.load(whole.arrays())
    first, second = (
        align(transformer, prototypes, labels, normal, generator=Generator().manual_seed(1), epochs=5)
        for transformer in (whole, resumed)
    )
    np.testing.assert_array_equal(first.centroids, second.centroids)
    assert first.mmd == second.mmd


def test_the_transformer_starts_from_the_runs_seed() -> None:
    weights = [FeatureTransformer(4, 6, seed).arrays()["0.weight"] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert np.abs(weights[0] - weights[2]).max() > 0.01


def test_bad_latents_are_named() -> None:
    prototypes, labels = rows()
    with pytest.raises(ValueError, match=r"latents of shape \(24, 5\), expected \(24, 6\)"):
        align(
            FeatureTransformer(4, 6, 1),
            prototypes,
            labels,
            lambda count, generator: normal(count, generator, 5),
            generator=Generator(),
        )
    with pytest.raises(TrainingError, match="not finite in epoch 1"):
        align(
            FeatureTransformer(4, 6, 1),
            prototypes,
            labels,
            lambda count, generator: torch.full((count, 6), math.nan),
            generator=Generator(),
        )
