"""Differentially private local training, DP-SGD (Abadi et al., CCS 2016, arXiv 1607.00133)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.training.objectives import LocalResult, LocalRound, Objective, Sum, TrainingError
from espalier_client.optimizers import create_optimizer
from espalier_client.privacy_accounting import Mechanism, require_opacus
from espalier_client.trainer import TrainingContext

if TYPE_CHECKING:
    from espalier.data.imageset import ImageSet

#: Maximum relative difference between the mean of the per-image gradients and autograd's gradient of the batch.
_TOLERANCE = 1e-3


def train_private(
    model: nn.Module,
    objective: Objective,
    data: ImageSet,
    local: LocalRound,
    mechanism: Mechanism,
    *,
    seed: int,
    device: torch.device | str,
) -> LocalResult:
    """Train a client's model in one round with DP-SGD, in place.

    Each step's batch is a Poisson sample: every image is in it with probability q, independently of the others. Each
    image's gradient is clipped to ``clip-norm`` in L2, Gaussian noise of standard deviation ``noise * clip-norm`` is
    added to their sum, and the sum is divided by the expected batch size. Terms that do not depend on the images (a
    proximal term, control variates) are added to the noised gradient. What the optimiser computes from it, including
    Adam's moments, is post-processing and spends no further privacy.

    A batch is computed in chunks of at most ``batch-size`` images, which bounds the memory of a large sample.

    Parameters
    ----------
    model : nn.Module
        The network with the received weights; moved to `device` and trained in place.
    objective : Objective
        The loss; each of its terms is a mean over images or does not depend on them.
    data : ImageSet
        The client's own images.
    local : LocalRound
        Settings and state; the state is replaced after training without an error.
    mechanism : Mechanism
        Noise, rate and steps. Noise 0 gives no privacy; it is for tests.
    seed : int
        Seed of batches, noise and dropout. It must be a secret of the device, as the noise can be subtracted by
        anyone who knows it.
    device : torch.device or str
        The device to train on, in single precision.

    Returns
    -------
    LocalResult
        See `train_local`; the loss is exact and must not leave the client.

    Raises
    ------
    TrainingError
        The client has no images, the network or a term combines several images, or the loss is not finite.
    ConfigError
        Opacus is not installed.
    """
    settings, count = local.settings, len(data)
    training = TrainingContext(model, data, local, seed, device)
    generator, parameters = training.generator, training.parameters
    sampling = np.random.default_rng((seed, 1))
    loss_sum, lr_sum, seen = 0.0, 0.0, 0
    with training.seeded():
        objective.begin(model, local)
        per_image, data_free = split_terms(objective)
        if own := list(objective.parameters()):
            raise TrainingError(f"a term has {len(own)} parameters of its own, which DP-SGD does not support")
        optimizer = create_optimizer(parameters, local)
        expected = min(settings.batch_size, count)
        gradients = PrivateGradients(
            model, parameters, settings.clip_norm, expected, mechanism.noise, generator
        )
        try:
            for _ in range(mechanism.steps):
                chosen = np.flatnonzero(sampling.random(count) < mechanism.rate)
                for chunk in _chunks(chosen, settings.batch_size):
                    images, labels = training.batch(chunk)
                    loss = per_image.loss(model, images, labels, generator)
                    gradients.add(loss, len(chunk))
                    loss_sum += float(loss.detach()) * len(chunk)
                    seen += len(chunk)
                gradients.release()
                _add_gradient(data_free, model, parameters, generator)
                objective.after_backward(model)
                lr_sum += optimizer.step()
                if not math.isfinite(loss_sum):
                    raise TrainingError(
                        f"the loss is not finite in round {local.round}; lower learning-rate or clip-norm"
                    )
        finally:
            gradients.close()
    optimizer.store(local.state)
    return training.result(mechanism.steps, loss_sum / seen if seen else math.nan, lr_sum)


def split_terms(objective: Objective) -> tuple[Objective, Objective]:
    """Return the sum of the terms that are means over images, and of those that do not depend on the images.

    Raises
    ------
    TrainingError
        A term depends on a batch as a whole, or none depends on the images.
    """
    terms = objective.terms if isinstance(objective, Sum) else (objective,)
    if mixed := [type(t).__name__ for t in terms if t.depends_on == "batch"]:
        raise TrainingError(
            f"DP-SGD cannot bound the contribution of one image to {', '.join(mixed)}; use fedavg"
        )
    per_image = [t for t in terms if t.depends_on == "images"]
    if not per_image:
        raise TrainingError("no term of this loss depends on the images, so DP-SGD does not apply")
    return Sum(per_image), Sum([t for t in terms if t.depends_on == "weights"])


class PrivateGradients:
    """The noised sums of clipped per-image gradients of one round, computed by Opacus.

    The per-image gradients of every layer come from functional autograd, not from Opacus' rules for layer types: the
    rule for convolutions requires an input in channels-first memory layout, which the output of a U-Net's attention is
    not (Opacus 1.6.0 then returns zeros). The first batch is checked against autograd nevertheless.

    Parameters
    ----------
    model : nn.Module
        The network, on its device.
    parameters : sequence of nn.Parameter
        The trained parameters.
    clip : float
        Maximum L2 norm of an image's gradient.
    expected : int
        Expected batch size, by which sums are divided.
    noise : float
        Standard deviation of the noise as a multiple of `clip`.
    generator : torch.Generator
        Source of the noise, on the network's device.

    Raises
    ------
    ConfigError
        Opacus is not installed.
    TrainingError
        The network has batch normalisation.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        clip: float,
        expected: int,
        noise: float,
        generator: torch.Generator,
    ) -> None:
        require_opacus()
        from opacus.grad_sample import GradSampleModule
        from opacus.optimizers import DPOptimizer

        if mixing := next(
            (n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)), None
        ):
            raise TrainingError(
                f"batch normalisation ({mixing}) combines the images of a batch; DP-SGD needs a model without it, "
                "e.g. model=cnn"
            )
        # Opacus adds the attributes `grad_sample` and `summed_grad` to them.
        self._parameters: Sequence[Any] = parameters
        self._module = GradSampleModule(model, loss_reduction="mean", strict=True, force_functorch=True)
        # Only its gradients are used; the caller's optimiser takes the step.
        self._optimizer = DPOptimizer(
            torch.optim.SGD(parameters, lr=0.0),
            noise_multiplier=noise,
            max_grad_norm=clip,
            expected_batch_size=expected,
            loss_reduction="mean",
            generator=generator,
            secure_mode=True,
        )
        self._checked = False
        # Torch warns that the first layer's inputs (images) need no gradient; Opacus does not use that gradient.
        warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients")

    def add(self, loss: Tensor, images: int) -> None:
        """Add the clipped gradients of a chunk of the batch, whose mean loss is `loss`."""
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter in self._parameters:
            if parameter.grad_sample is None:  # the loss does not depend on it
                parameter.grad_sample = parameter.new_zeros((images, *parameter.shape))
        if not self._checked:
            self._check()
        self._optimizer.signal_skip_step(True)
        self._optimizer.pre_step()
        self._optimizer.zero_grad(set_to_none=True)

    def release(self) -> None:
        """Set the parameters' ``grad`` to the noised mean gradient of the batch, which may be empty."""
        for parameter in self._parameters:
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
        self._optimizer.signal_skip_step(False)
        self._optimizer.pre_step()
        for parameter in self._parameters:
            parameter.grad_sample = parameter.summed_grad = None

    def close(self) -> None:
        """Remove Opacus' hooks from the network."""
        self._module.to_standard_module()

    def _check(self) -> None:
        """Compare the mean of the per-image gradients with autograd's gradient of the chunk.

        Raises
        ------
        TrainingError
            They differ: the per-image gradients of some layer are wrong.
        """
        self._checked = True
        error, size = 0.0, 0.0
        for parameter in self._parameters:
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            error += float((parameter.grad_sample.mean(0) - expected).square().sum())
            size += float(expected.square().sum())
        if error > _TOLERANCE**2 * size:
            raise TrainingError(
                "the per-image gradients do not add up to the batch's: this network cannot be trained with DP-SGD"
            )


def _chunks(chosen: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(chosen), size):
        yield chosen[start : start + size]


def _add_gradient(
    term: Objective, model: nn.Module, parameters: Sequence[nn.Parameter], generator: torch.Generator
) -> None:
    """Add the gradient of the terms that do not depend on the images to the parameters' ``grad``."""
    if not isinstance(term, Sum) or not term.terms:
        return
    no_images = torch.zeros((0, 1, 1, 1), device=parameters[0].device)
    no_labels = torch.zeros(0, dtype=torch.int64, device=no_images.device)
    value = term.loss(model, no_images, no_labels, generator)
    if not value.requires_grad:
        return
    gradients = torch.autograd.grad(value, list(parameters), allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None and parameter.grad is not None:
            parameter.grad += gradient
