"""Quality: the distances against closed forms, the feature networks, and the order of the reference values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from espalier.data.imageset import TensorImages, to_float
from espalier.data.spec import open_data
from espalier.errors import ConfigError, DataError
from espalier_server.evaluation import features as features_module
from espalier_server.evaluation import quality as quality_module
from espalier_server.evaluation.features import ClassifierFeatures, InceptionFeatures, open_features
from espalier_server.evaluation.quality import (
    Quality,
    frechet_distance,
    gaussian_images,
    inception_score,
    kernel_distance,
)


def exactly(mean: list[float], deviation: list[float], count: int = 400) -> torch.Tensor:
    """Points whose sample mean and (n-1) covariance are exactly `mean` and diag(deviation^2)."""
    noise = np.random.default_rng(0).standard_normal((count, len(mean)))
    noise -= noise.mean(axis=0)
    whitened, _ = np.linalg.qr(noise)
    return torch.from_numpy(whitened * np.sqrt(count - 1) * deviation + mean)


def test_frechet_distance_of_known_gaussians() -> None:
    # |mu|^2 = 1 + 4; commuting covariances: sum (s1 - s2)^2 = (1-3)^2 + (2-2)^2 + (0.5-1)^2.
    one = exactly([0.0, 0.0, 0.0], [1.0, 2.0, 0.5])
    other = exactly([1.0, 2.0, 0.0], [3.0, 2.0, 1.0])
    assert frechet_distance(one, other) == pytest.approx(5 + 4 + 0.25, abs=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0.0, abs=1e-9)
    # Rotating both changes nothing, and gives covariances that are not diagonal.
    turn = torch.linalg.qr(torch.from_numpy(np.random.default_rng(1).standard_normal((3, 3))))[0]
    assert frechet_distance(one @ turn, other @ turn) == pytest.approx(9.25, abs=1e-8)


def test_frechet_distance_with_fewer_samples_than_features() -> None:
    few = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 64)))
    many = torch.from_numpy(np.random.default_rng(1).standard_normal((300, 64)))
    assert np.isfinite(frechet_distance(many, few))
    assert frechet_distance(few, few) == pytest.approx(0.0, abs=1e-6)


def test_kernel_distance_by_hand() -> None:
    # One dimension, k(x, y) = (x y + 1)^3, real {0, 1}, generated {1, 2}: within 1, within 27, across 1 1 8 27.
    real, generated = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    across = (1 + 1 + 8 + 27) / 4
    assert kernel_distance(real, generated, seed=0) == pytest.approx(1 + 27 - 2 * across)


def test_kernel_distance_leaves_the_callers_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_module, "_KID_SUBSET_SIZE", 10)
    points = torch.from_numpy(np.random.default_rng(0).standard_normal((30, 3)))
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = kernel_distance(points, points + 1, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert kernel_distance(points, points + 1, seed=1) == first
    assert kernel_distance(points, points + 1, seed=2) != first


def test_inception_score_by_hand() -> None:
    sure = torch.eye(4).repeat(3, 1) * 100.0  # certain, and all four classes alike: exp(log 4)
    assert inception_score(sure, seed=0) == pytest.approx(4.0)
    assert inception_score(sure[:1].repeat(8, 1), seed=0) == pytest.approx(1.0)
    # Half certain of each of 2 classes: p = (.75, .25) or its mirror against (.5, .5).
    p = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    expected = np.exp(0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    assert inception_score(p.log(), seed=0) == pytest.approx(expected)


def test_gaussian_images_have_the_pixels_mean_and_covariance() -> None:
    rng = np.random.default_rng(0)
    mix = np.array([[0.1, 0.0], [0.08, 0.05]])
    images = torch.from_numpy((rng.standard_normal((500, 2)) @ mix.T + [0.2, -0.1]).astype(np.float32))
    drawn = (
        gaussian_images(images.reshape(500, 1, 1, 2), 20_000, np.random.default_rng(1)).reshape(-1, 2).numpy()
    )
    assert np.allclose(drawn.mean(0), images.numpy().mean(0), atol=0.003)
    assert np.allclose(np.cov(drawn.T), np.cov(images.numpy().T), rtol=0.05)
    assert gaussian_images(images.reshape(500, 1, 1, 2) * 9, 50, rng).abs().max() == 1.0


@pytest.fixture(scope="module")
def digits() -> tuple[TensorImages, TensorImages]:
    train, test = open_data("digits"), open_data("digits", split="test")
    assert isinstance(train, TensorImages)
    assert isinstance(test, TensorImages)
    return train, test


@pytest.fixture(scope="module")
def quality(digits: tuple[TensorImages, TensorImages]) -> Quality:
    return Quality(digits[1], train=digits[0], seed=2023)


def test_classifier_knows_held_out_digits(
    quality: Quality, digits: tuple[TensorImages, TensorImages]
) -> None:
    features, logits = quality.network.extract(digits[1].fetch(np.arange(360)))
    assert features.shape == (360, 64)
    assert features.dtype == torch.float64
    assert (logits.argmax(1).numpy() == digits[1].labels).mean() > 0.95


def test_scores_order_as_eyes_do(quality: Quality, digits: tuple[TensorImages, TensorImages]) -> None:
    train, _ = digits
    real = train.fetch(np.arange(0, 1200, 3))
    generator = torch.Generator().manual_seed(0)
    spoilt = real + 0.5 * torch.randn(real.shape, generator=generator)
    noise = torch.rand(real.shape, generator=generator) * 2 - 1
    best, middle, worst = (quality.measure(images) for images in (real, spoilt, noise))
    assert best.frechet < middle.frechet < best.gaussian < worst.frechet
    assert best.kid < middle.kid < worst.kid
    assert best.inception_score > middle.inception_score > worst.inception_score
    assert best.floor < best.gaussian < best.noise / 3
    assert worst.frechet == pytest.approx(best.noise, rel=0.1)
    assert best.frechet == pytest.approx(best.floor, abs=1.0)
    # Every figure has its floor and ceiling beside it.
    floor, ceiling = best.references["floor"], best.references["noise"]
    assert (floor.frechet, ceiling.frechet) == (best.floor, best.noise)
    assert floor.kid < best.references["gaussian"].kid < ceiling.kid
    assert floor.inception_score > best.references["gaussian"].inception_score > ceiling.inception_score
    # One digit only looks real, and is found out.
    threes = train.fetch(np.flatnonzero(train.labels == 3)[:100])
    assert quality.measure(threes).frechet > best.gaussian


def test_scores_say_what_they_are(quality: Quality, digits: tuple[TensorImages, TensorImages]) -> None:
    scores = quality.measure(digits[0].fetch(np.arange(100)))
    assert scores.features == "digits features"
    assert scores.caption == "Fréchet distance (digits features)"
    assert scores.samples == 100
    wanted = {"frechet", "inception_score", "kid", "features", "floor", "noise"}
    assert wanted <= json.loads(json.dumps(scores.as_dict(), allow_nan=False)).keys()
    assert quality.measure(digits[0].fetch(np.arange(100))) == scores


def test_few_images_are_measured_and_bad_ones_refused(quality: Quality) -> None:
    assert np.isfinite(quality.measure(torch.zeros(2, 1, 8, 8)).frechet)
    with pytest.raises(DataError, match="at least 2 generated"):
        quality.measure(torch.zeros(1, 1, 8, 8))
    with pytest.raises(DataError, match=r"\(3, 8, 8\)"):
        quality.measure(torch.zeros(4, 3, 8, 8))
    with pytest.raises(DataError, match="not finite"):
        quality.measure(torch.full((4, 1, 8, 8), float("nan")))


def toy(name: str = "toy", classes: int = 2, count: int = 40, seed: int = 0) -> TensorImages:
    labels = np.arange(count) % classes
    pixels = np.random.default_rng(seed).integers(0, 100, (count, 1, 6, 6))
    pixels[labels == 1] += 120
    return TensorImages(
        torch.from_numpy(pixels.astype(np.uint8)), labels, [str(c) for c in range(classes)], name
    )


def test_a_classifier_is_the_same_by_seed_and_kept_by_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(features_module, "_STEPS", (20, 20))
    images = to_float(toy().pixels)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = ClassifierFeatures(toy(), seed=1, cache=tmp_path)
    assert not list(tmp_path.iterdir())  # nothing is trained before it is needed
    assert isinstance(first.model, torch.nn.Module)
    assert torch.equal(torch.random.get_rng_state(), state)
    again = ClassifierFeatures(toy(), seed=1)
    assert torch.equal(first.extract(images)[0], again.extract(images)[0])
    other = ClassifierFeatures(toy(), seed=2, cache=tmp_path)
    assert not torch.equal(first.extract(images)[0], other.extract(images)[0])
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 2
    assert {file.suffix for file in kept} == {".safetensors"}

    trainings: list[int] = []
    fit = features_module._fit

    def counted(*given: Any) -> None:
        trainings.append(1)
        fit(*given)

    monkeypatch.setattr(features_module, "_fit", counted)
    loaded = ClassifierFeatures(toy(), seed=1, cache=tmp_path)
    assert torch.equal(first.extract(images)[0], loaded.extract(images)[0])
    assert not trainings
    assert ClassifierFeatures(toy(seed=1), seed=1, cache=tmp_path).model  # other pixels
    assert len(trainings) == 1
    for file in tmp_path.iterdir():
        file.write_bytes(b"damaged")
    mended = ClassifierFeatures(toy(), seed=1, cache=tmp_path)
    assert torch.equal(first.extract(images)[0], mended.extract(images)[0])
    assert "training it again" in caplog.text


def test_the_feature_network_is_trained_on_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    trainings: list[int] = []
    monkeypatch.setattr(features_module, "_fit", lambda *_: trainings.append(1))
    quality = Quality(toy(), train=toy(), seed=0)  # clients wait for this one before they train
    assert not trainings
    for _ in range(2):
        quality.measure(to_float(toy(count=3, seed=5).pixels))
    assert len(trainings) == 1


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(DataError, match="fewer than two classes"):
        open_features("classifier", toy(classes=1), seed=0)
    with pytest.raises(ConfigError, match="classifier, inception"):
        open_features("vgg", toy(), seed=0)
    with pytest.raises(DataError, match=r"\(1, 8, 8\)"):
        Quality(open_data("digits", split="test"), train=toy(), seed=0)
    with pytest.raises(DataError, match="at least 2 reference"):
        Quality(toy().subset(np.array([0])), train=toy(), seed=0)


def test_inception_is_never_replaced_silently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("ESPALIER_DOWNLOAD", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(DataError, match=r"weights-inception-2015-12-05-6726825d\.pth") as caught:
        Quality(toy(), train=toy(), features="inception", seed=0)
    assert "ESPALIER_DOWNLOAD=1" in str(caught.value)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"damaged")
    with pytest.raises(DataError, match="are damaged"):
        InceptionFeatures()


def test_inception_features_from_weights_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from espalier.torchvision_shim import import_torchvision

    import_torchvision()
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    # The published weights are not at hand: random ones of the same network go the same way.
    with monkeypatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), tmp_path / "weights-inception-2015-12-05-6726825d.pth")
    monkeypatch.setenv("ESPALIER_DATA", str(tmp_path))
    monkeypatch.setattr(
        quality_module, "frechet_distance", lambda real, generated: 7.0
    )  # slow in 2048 dimensions
    quality = Quality(toy(count=4), train=toy(count=4), features="inception", seed=0)
    scores = quality.measure(to_float(toy(count=3, seed=5).pixels))
    assert (scores.caption, scores.features) == ("FID", "Inception-v3 features")
    assert quality.network.extract(torch.zeros(2, 1, 6, 6))[0].shape == (2, 2048)
