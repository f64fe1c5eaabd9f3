"""DP-SGD: local training of which no single image can be told (Abadi et al., CCS 2016, arXiv 1607.00133)."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.training.objectives import LocalResult, LocalRound, Objective, Sum, TrainingError
from espalier_client.optimizers import create_optimizer
from espalier_client.privacy_accounting import Mechanism, require_opacus
from espalier_client.trainer import seeded

if TYPE_CHECKING:
    from espalier.data.imageset import ImageSet

#: Largest relative difference between the mean of the images' gradients and autograd's gradient of the batch.
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

    Each step's batch is a Poisson sample: every image is in it with probability q, whatever the others do.
    Each image's gradient is clipped to ``clip-norm`` in L2, Gaussian noise of standard deviation ``noise *
    clip-norm`` is added to their sum, and the sum is divided by the expected size of a batch.
    Terms that no image enters (a proximal term, control variates) act on the noised gradient. What the
    optimiser makes of it, Adam's moments included, costs no further privacy.

    A batch is computed in pieces of at most ``batch-size`` images, so a chance large one needs no more memory.

    Parameters
    ----------
    model : nn.Module
        Holds the received weights; moved to `device` and trained in place.
    objective : Objective
        What to minimise; each term depends on images one by one or on none.
    data : ImageSet
        The client's own images.
    local : LocalRound
        Settings and state; the state is replaced at the end, and only if training went well.
    mechanism : Mechanism
        Noise, rate and steps. Noise 0 gives no privacy; it is for tests.
    seed : int
        Seed of batches, noise and dropout. It must be a secret of the device: who knows it can
        subtract the noise.
    device : torch.device or str
        Where to train, in single precision.

    Returns
    -------
    LocalResult
        As of `train_local`; the loss is exact and must not leave the client.

    Raises
    ------
    TrainingError
        The client has no images, the network or a term mixes images, or the loss is not finite.
    ConfigError
        Opacus is not installed.
    """
    settings, count = local.settings, len(data)
    if count == 0:
        raise TrainingError(f"round {local.round}: this client has no images to train on")
    device = torch.device(device)
    model.to(device).train()
    started, worked = time.perf_counter(), time.process_time()
    generator = torch.Generator(device=device).manual_seed(seed)
    sampling = np.random.default_rng((seed, 1))
    labels = np.asarray(data.labels)
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss_sum, lr_sum, seen = 0.0, 0.0, 0
    with seeded(seed, device):
        objective.begin(model, local)
        per_image, free = split_terms(objective)
        if own := list(objective.parameters()):
            raise TrainingError(
                f"a term brings {len(own)} parameters of its own, which DP-SGD does not cover"
            )
        optimizer = create_optimizer(parameters, local)
        expected = min(settings.batch_size, count)
        gradients = PrivateGradients(
            model, parameters, settings.clip_norm, expected, mechanism.noise, generator
        )
        try:
            for _ in range(mechanism.steps):
                chosen = np.flatnonzero(sampling.random(count) < mechanism.rate)
                for piece in _pieces(chosen, settings.batch_size):
                    images = data.fetch(piece).to(device, non_blocking=True)
                    if settings.flip:
                        mirrored = torch.rand(len(piece), generator=generator, device=device) < 0.5
                        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
                    batch_labels = torch.from_numpy(labels[piece]).to(device, non_blocking=True)
                    loss = per_image.loss(model, images, batch_labels, generator)
                    gradients.add(loss, len(piece))
                    loss_sum += float(loss.detach()) * len(piece)
                    seen += len(piece)
                gradients.release()
                _add_gradient(free, model, parameters, generator)
                objective.after_backward(model)
                lr_sum += optimizer.step()
                if not math.isfinite(loss_sum):
                    raise TrainingError(
                        f"the loss is not finite in round {local.round}; lower learning-rate or clip-norm"
                    )
        finally:
            gradients.close()
    optimizer.store(local.state)
    return LocalResult(
        steps=mechanism.steps,
        samples=count,
        loss=loss_sum / seen if seen else math.nan,
        lr_sum=lr_sum,
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - worked,
    )


def split_terms(objective: Objective) -> tuple[Objective, Objective]:
    """Return the sum of the terms that images enter one by one, and of those that no image enters.

    Raises
    ------
    TrainingError
        A term is neither.
    """
    terms = objective.terms if isinstance(objective, Sum) else (objective,)
    if mixed := [type(t).__name__ for t in terms if t.depends_on == "batch"]:
        raise TrainingError(f"DP-SGD cannot bound what one image gives to {', '.join(mixed)}; use fedavg")
    per_image = [t for t in terms if t.depends_on == "images"]
    if not per_image:
        raise TrainingError("no term of this loss depends on the images; DP-SGD has nothing to do")
    return Sum(per_image), Sum([t for t in terms if t.depends_on == "weights"])


class PrivateGradients:
    """The noised sums of clipped per-image gradients of one round, computed by Opacus.

    The gradient of each layer is taken by functional autograd rather than by Opacus' own rule for the layer:
    its rule for convolutions reads the input as if it lay in memory channels first, and behind a U-Net's attention it
    does not (Opacus 1.6.0 then returns zeros). The first batch is checked against autograd all the same.

    Parameters
    ----------
    model : nn.Module
        The network, on its device; the caller trains it as it is.
    parameters : sequence of nn.Parameter
        What is trained.
    clip : float
        Largest L2 norm of an image's gradient.
    expected : int
        Size that sums are divided by, the expected size of a batch.
    noise : float
        Standard deviation of the noise over `clip`.
    generator : torch.Generator
        Source of the noise, on the network's device.
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
                f"batch normalisation ({mixing}) mixes the images of a batch; DP-SGD needs a model without it, "
                "e.g. model=cnn"
            )
        # Opacus hangs `grad_sample` and `summed_grad` on them.
        self._parameters: Sequence[Any] = parameters
        self._module = GradSampleModule(model, loss_reduction="mean", strict=True, force_functorch=True)
        # Only its gradients are used; the step is the caller's.
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
        # The first layer's inputs are images, which need no gradient; Opacus does not use it.
        warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients")

    def add(self, loss: Tensor, images: int) -> None:
        """Add the clipped gradients of a piece of the batch, of which `loss` is the mean over its images."""
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
        """Put the noised mean gradient of the batch, which may have been empty, into the parameters' ``grad``."""
        for parameter in self._parameters:
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
        self._optimizer.signal_skip_step(False)
        self._optimizer.pre_step()
        for parameter in self._parameters:
            parameter.grad_sample = parameter.summed_grad = None

    def close(self) -> None:
        """Take Opacus' hooks off the network again."""
        self._module.to_standard_module()

    def _check(self) -> None:
        """Compare the mean over the images with what autograd says of the whole piece.

        Raises
        ------
        TrainingError
            They differ: the gradients of some layer are wrong.
        """
        self._checked = True
        off, size = 0.0, 0.0
        for parameter in self._parameters:
            whole = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            off += float((parameter.grad_sample.mean(0) - whole).square().sum())
            size += float(whole.square().sum())
        if off > _TOLERANCE**2 * size:
            raise TrainingError(
                "the images' gradients do not add up to the batch's: this network cannot be trained with DP-SGD"
            )


def _pieces(chosen: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(chosen), size):
        yield chosen[start : start + size]


def _add_gradient(
    term: Objective, model: nn.Module, parameters: Sequence[nn.Parameter], generator: torch.Generator
) -> None:
    """Add the gradient of terms that no image enters to the parameters' ``grad``."""
    if not isinstance(term, Sum) or not term.terms:
        return
    nothing = torch.zeros((0, 1, 1, 1), device=parameters[0].device)
    value = term.loss(model, nothing, torch.zeros(0, dtype=torch.int64, device=nothing.device), generator)
    if not value.requires_grad:
        return
    found = torch.autograd.grad(value, list(parameters), allow_unused=True)
    for parameter, gradient in zip(parameters, found, strict=True):
        if gradient is not None and parameter.grad is not None:
            parameter.grad += gradient
