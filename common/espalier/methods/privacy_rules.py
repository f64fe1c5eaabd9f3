"""Configuration checks of differential privacy: settings that are incompatible with noise at the clients."""

from __future__ import annotations

from espalier.config.run_settings import RunSettings
from espalier.methods.base import Method
from espalier.methods.faug import AugmentSettings
from espalier.models.presets import MODELS, normalises_batches, task_of
from espalier.training.privacy import PrivacySettings

#: Selections that send no inquiry to clients.
_WITHOUT_INQUIRY = ("uniform", "proportional", "bernoulli")
#: Inquiries that a client under differential privacy answers: the guarantee does not cover its test images.
ANSWERED = frozenset({"accuracy", "samples"})


def privacy_faults(method: type[Method], settings: RunSettings) -> list[str]:
    """Return the faults of the privacy settings, one line each, starting with the key.

    Settings that disclose data without noise are rejected, so that the reported epsilon covers everything that a
    server receives from training.
    """
    faults, private = _own_faults(settings), settings.of(PrivacySettings)
    selection = method.chosen(settings, "selection")
    if private.update_clip and (method.own_models or selection == "divfl"):
        what = method.name if method.own_models else "selection=divfl"
        faults.append(
            f"update-clip: with {what} a reply is more than an update of the received weights; set it to 0"
        )
    if not private.private:
        return faults
    key = "dp-sgd-noise" if private.dp_sgd else "update-noise"
    if normalises_batches(settings.model):
        fitting = [m for m in MODELS if task_of(m) == task_of(settings.model) and not normalises_batches(m)]
        faults.append(
            f"model: batch normalisation mixes the images of a batch and reveals its statistics, so {key} does "
            f"not bound the influence of an image; use {', '.join(fitting)}"
        )
    if method.extra_disclosure:
        faults.append(
            f"{key}: with {method.name} a client also discloses {method.extra_disclosure}; use fedavg"
        )
    elif private.dp_sgd and not method.per_example_loss:
        faults.append(
            f"{key}: the loss of {method.name} is not a mean of per-image losses; use fedavg, or update-noise"
        )
    if selection not in _WITHOUT_INQUIRY:
        faults.append(f"selection: {selection} asks clients for losses or gradients; use uniform with {key}")
    if (augment := settings.of(AugmentSettings).augment) != "none":
        faults.append(f"augment: {augment} uploads images, which {key} does not protect; set augment=none")
    if (
        private.update_noise
        and not private.dp_sgd
        and settings.eval_clients
        and task_of(settings.model) == "diffusion"
    ):
        faults.append(
            "eval-clients: clients would send samples of networks without update-noise; set it to false"
        )
    return faults


def _own_faults(settings: RunSettings) -> list[str]:
    """Return the faults of the privacy settings alone, without method and model."""
    faults, private = [], settings.of(PrivacySettings)
    if private.dp_sgd_noise and private.dp_sgd_epsilon:
        faults.append("dp-sgd-epsilon: dp-sgd-noise determines it already; set one of the two to 0")
    if private.dp_sgd and not settings.clip_norm:
        faults.append("clip-norm: DP-SGD clips every image's gradient to it; set e.g. clip-norm=1")
    if private.dp_sgd and settings.precision == "bf16":
        faults.append("precision: DP-SGD computes in single precision; set precision=auto or fp32")
    if private.update_noise and not private.update_clip:
        faults.append("update-clip: update-noise is a multiple of it; set e.g. update-clip=1")
    return faults
