"""Privacy accounting of Gaussian noise: mechanisms, and their epsilon by Opacus' accountant."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from espalier import lazy
from espalier.distribution import install_command
from espalier.errors import ConfigError
from espalier.training.privacy import DeltaSettings, PrivacySettings

if TYPE_CHECKING:
    import opacus
    from opacus import accountants
    from opacus.accountants import utils
    from opacus.accountants.analysis import rdp

    from espalier.config.run_settings import RunSettings
else:
    opacus, accountants = lazy.load("opacus"), lazy.load("opacus.accountants")
    utils, rdp = lazy.load("opacus.accountants.utils"), lazy.load("opacus.accountants.analysis.rdp")


@dataclass(frozen=True)
class Mechanism:
    """A subsampled Gaussian mechanism, applied several times.

    Attributes
    ----------
    noise : float
        Standard deviation of the noise over the sensitivity.
    rate : float
        Probability q of each image to be in a step's batch.
    steps : int
        Number of applications.
    """

    noise: float
    rate: float
    steps: int


def mechanism_of(settings: RunSettings, images: int, noise: float) -> Mechanism:
    """Return the mechanism of one round of DP-SGD over a number of images."""
    steps = settings.local_steps or settings.local_epochs * math.ceil(images / settings.batch_size)
    return Mechanism(noise, min(1.0, settings.batch_size / images), steps)


def noise_of(settings: RunSettings, images: int) -> float:
    """Return a client's noise multiplier of DP-SGD: the run's, or the one that keeps all rounds within epsilon.

    A client that misses rounds spends less than epsilon.
    """
    private, delta = settings.of(PrivacySettings), settings.of(DeltaSettings).dp_delta
    if private.dp_sgd_noise:
        return private.dp_sgd_noise
    one_round = mechanism_of(settings, images, 1.0)
    return noise_for(private.dp_sgd_epsilon, delta, one_round.rate, one_round.steps * settings.rounds)


def update_mechanism(settings: RunSettings) -> Mechanism:
    """Return the mechanism of noise on one clipped update, for a change of all of the client's images.

    Two updates clipped to C differ by at most 2 C, so noise of sigma C is sigma / 2 times the sensitivity.
    """
    return Mechanism(settings.of(PrivacySettings).update_noise / 2, 1.0, 1)


def require_opacus() -> None:
    """Check that Opacus is installed.

    Raises
    ------
    ConfigError
        If it is not.
    """
    try:
        _ = opacus.accountants
    except ImportError as error:
        raise ConfigError(
            f"differential privacy needs Opacus ({error}); run: {install_command('privacy')}"
        ) from None


def epsilon_of(spent: Iterable[Sequence[float]], delta: float) -> float:
    """Return the epsilon of a sequence of subsampled Gaussian mechanisms, by Opacus' RDP accountant.

    Parameters
    ----------
    spent : iterable of (noise, rate, steps)
        Fields of :class:`Mechanism`.
    delta : float
        Delta of the guarantee.
    """
    history = [(float(noise), float(rate), int(steps)) for noise, rate, steps in spent]
    if not history:
        return 0.0
    if any(noise == 0 for noise, _, _ in history):
        return math.inf
    require_opacus()
    spent_by_order = sum(steps * _divergence(noise, rate) for noise, rate, steps in history)
    with warnings.catch_warnings():
        # The warning that the optimum is at the largest order only means that the bound is not tight.
        warnings.simplefilter("ignore")
        epsilon, _ = rdp.get_privacy_spent(
            orders=accountants.RDPAccountant.DEFAULT_ALPHAS, rdp=spent_by_order, delta=delta
        )
    return float(epsilon)


@lru_cache(maxsize=256)
def _divergence(noise: float, rate: float) -> NDArray[np.float64]:
    """Return the Rényi divergence of one step by the accountant's orders; steps add up, and it is slow to compute."""
    orders = accountants.RDPAccountant.DEFAULT_ALPHAS
    return np.asarray(rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=orders))


@lru_cache(maxsize=64)
def noise_for(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """Return the smallest noise multiplier that keeps a number of steps within epsilon.

    Raises
    ------
    ConfigError
        If there is none.
    """
    require_opacus()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(
                utils.get_noise_multiplier(
                    target_epsilon=epsilon,
                    target_delta=delta,
                    sample_rate=rate,
                    steps=steps,
                    epsilon_tolerance=min(0.01, epsilon / 100),
                )
            )
    except ValueError as error:
        raise ConfigError(
            f"dp-sgd-epsilon: no noise keeps {steps} steps within {epsilon:g} at dp-delta={delta:g}; raise one of them"
        ) from error
