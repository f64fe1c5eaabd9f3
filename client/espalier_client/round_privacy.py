"""Differential privacy in one round: checks the plan, charges the ledger, noises the update and edits the report."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import numpy as np

from espalier.config.run_settings import RunSettings
from espalier.errors import WireError
from espalier.methods.privacy_rules import ANSWERED
from espalier.training.objectives import TrainingError
from espalier.training.privacy import EPSILON, DeltaSettings, PrivacySettings
from espalier.wire.sections import SectionId, Sections
from espalier.wire.uplink import Key
from espalier_client.device import Device
from espalier_client.privacy_accounting import Mechanism, mechanism_of, noise_of, update_mechanism
from espalier_proto import espalier_pb2 as pb

log = logging.getLogger("espalier.client")

#: Metrics of a report that do not depend on the images.
_DATA_FREE_METRICS = frozenset({"lr-sum"})


def check_plan(device: Device, plan: pb.RoundPlan, settings: RunSettings) -> None:
    """Refuse a plan whose reply would violate the run's or the owner's privacy settings.

    Raises
    ------
    WireError
        The owner limits the privacy budget and the run is not private, or a private run asks for an exact answer.
    """
    private = settings.of(PrivacySettings)
    if device.privacy_budget and not private.private:
        raise WireError(
            plan.edge,
            f"the owner of {device.name} limits its privacy budget and this run is not private; "
            "set dp-sgd-noise or update-noise",
        )
    if plan.inquiry and private.private:
        # Samples are drawn from the device's own layers, which were trained with DP-SGD or not at all.
        allowed = ANSWERED if private.dp_sgd else ANSWERED - {"samples"}
        if plan.inquiry not in allowed:
            raise WireError(
                plan.edge,
                f"the inquiry {plan.inquiry!r}, whose exact answer reveals information on the images",
            )


class RoundPrivacy:
    """The privacy accounting of one device in one round, from before its training to its reply.

    Parameters
    ----------
    device : Device
        This device.
    plan : pb.RoundPlan
        The round's plan.
    settings : RunSettings
        The run's settings.
    images : int
        Number of images that are trained on.

    Raises
    ------
    TrainingError
        The round would exceed `dp-sgd-epsilon`: the device has trained more often than was planned.
    ConfigError
        The device has no state folder, or Opacus is not installed.
    """

    def __init__(self, device: Device, plan: pb.RoundPlan, settings: RunSettings, images: int) -> None:
        self._device, self._plan, self._settings = device, plan, settings
        self.training: Mechanism | None = None
        self._private, self._delta = settings.of(PrivacySettings), settings.of(DeltaSettings).dp_delta
        if self._private.dp_sgd:
            self.training = mechanism_of(settings, images, noise_of(settings, images))
            target = self._private.dp_sgd_epsilon
            after = device.privacy_ledger.epsilon(plan.run, "dp-sgd", self._delta, self.training)
            if target and after > target:
                raise TrainingError(
                    f"epsilon would be {after:.4g}, above dp-sgd-epsilon={target:g}: rounds were repeated, and each "
                    "repetition spends privacy"
                )

    def spend(self) -> None:
        """Charge the ledger for the round before the work, so that a lost reply counts as sent."""
        run = self._plan.run
        if self.training:
            self._device.privacy_ledger.charge(run, "dp-sgd", self.training)
        if self._private.update_noise:
            self._device.privacy_ledger.charge(run, "update", update_mechanism(self._settings))

    def noised(
        self,
        arrays: dict[SectionId, dict[str, np.ndarray]],
        received: Sections,
        keys: Iterable[Key],
        buffers: frozenset[str],
    ) -> dict[SectionId, dict[str, np.ndarray]]:
        """Return a reply's tensors, with their differences to the received ones clipped and noised."""
        s = self._private
        if not s.update_clip:
            return arrays
        rng = self._device.private_rng(self._plan.round, "update")
        noisy = noisy_update(arrays, received, keys, buffers, s.update_clip, s.update_noise, rng)
        return {section: {**tensors, **noisy.get(section, {})} for section, tensors in arrays.items()}

    def describe(self, report: pb.ClientReport) -> None:
        """Remove the exact statistics of the images from a report, and add the epsilon spent."""
        s = self._private
        if not s.private:
            return
        budget = self._device.privacy_ledger
        report.loss = math.nan
        for name in [n for n in report.metrics if n not in _DATA_FREE_METRICS]:
            del report.metrics[name]
        if s.dp_sgd:
            report.metrics[EPSILON["dp-sgd"]] = budget.epsilon(self._plan.run, "dp-sgd", self._delta)
        if s.update_noise:
            report.metrics[EPSILON["update"]] = budget.epsilon(self._plan.run, "update", self._delta)
        spent = {n: round(report.metrics[n], 3) for n in EPSILON.values() if n in report.metrics}
        log.info(
            "run %s: spent %s at delta %g; over all runs %.3g",
            self._plan.run,
            spent,
            self._delta,
            budget.total(),
        )


def noisy_update(
    arrays: Sections,
    received: Sections,
    keys: Iterable[Key],
    buffers: frozenset[str],
    clip: float,
    noise: float,
    rng: np.random.Generator,
) -> dict[SectionId, dict[str, np.ndarray]]:
    """Clip the difference between a reply and the received tensors to L2 norm `clip`, and add Gaussian noise.

    All trained tensors of the reply form one vector. Buffers are not part of it; with noise, the received ones are
    returned unchanged.

    Parameters
    ----------
    arrays, received : mapping of SectionId to mapping of str to numpy.ndarray
        The tensors after training and before it.
    keys : iterable of (SectionId, str)
        The tensors of the reply.
    buffers : frozenset of str
        The network's tensors that are not trained.
    clip : float
        Largest L2 norm of the difference.
    noise : float
        Standard deviation of the noise as a multiple of `clip`; 0: clip only.
    rng : numpy.random.Generator
        Source of the noise; its seed must be secret.

    Raises
    ------
    TrainingError
        A tensor of the reply has no received counterpart of its shape, or the update is not finite.
    """
    keys = list(keys)
    trained = [key for key in keys if key[1] not in buffers]
    for section, name in keys:
        array, before = arrays[section][name], received.get(section, {}).get(name)
        unmatched = before is None or before.shape != array.shape
        if unmatched or (name not in buffers and array.dtype.kind != "f"):
            raise TrainingError(f"update-clip: {name!r} has no received tensor to differ from")
    differences = {(s, n): arrays[s][n].astype(np.float64) - received[s][n] for s, n in trained}
    norm = math.sqrt(sum(float(np.square(d).sum()) for d in differences.values()))
    if not math.isfinite(norm):
        raise TrainingError("the update is not finite; lower learning-rate")
    scale = min(1.0, clip / norm) if norm else 1.0
    result: dict[SectionId, dict[str, np.ndarray]] = {}
    if noise:
        for section, name in keys:
            if name in buffers:
                result.setdefault(section, {})[name] = received[section][name]
    for (section, name), difference in differences.items():
        change = scale * difference
        if noise:
            change += noise * clip * rng.standard_normal(difference.shape)
        noisy = (received[section][name] + change).astype(arrays[section][name].dtype)
        result.setdefault(section, {})[name] = noisy
    return result
