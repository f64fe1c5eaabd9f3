"""Configuration checks of combinations of method, model, selection, levels and reproducibility."""

from __future__ import annotations

from espalier.config.run_settings import RunSettings
from espalier.config.timeouts import chains, order_faults
from espalier.methods.base import Method
from espalier.methods.levels import LevelSettings
from espalier.methods.privacy_rules import privacy_faults
from espalier.models.presets import MODELS, family_of, task_of
from espalier.tasks.diffusion_settings import DiffusionSettings
from espalier.training.privacy import PrivacySettings


def contradictions(method: type[Method], settings: RunSettings) -> list[str]:
    """Return the faults of combinations of settings, one line each, starting with the key."""
    faults = list(method.contradictions(settings))
    task, family = task_of(settings.model), family_of(settings.model)
    if task not in method.tasks or (method.families and family not in method.families):
        fitting = [
            name
            for name in MODELS
            if task_of(name) in method.tasks and (not method.families or family_of(name) in method.families)
        ]
        faults.append(
            f"model: {settings.model} does not go with method={method.name}; use {', '.join(fitting)}"
        )
    selection = method.chosen(settings, "selection")
    if method.has_levels:
        if settings.of(LevelSettings).shares[0] != 1:
            faults.append(
                "levels: the largest must be 1, otherwise a part of the network is not trained; add it, e.g. 1,0.5"
            )
        if selection == "divfl":
            faults.append(
                f"selection: divfl compares gradients of the whole network, clients of {method.name} have parts of it; "
                "use pow-d or uniform"
            )
    faults += _not_reproducible(settings, method.chosen(settings, "edge_choice"))
    if settings.ema_decay and not method.has_one_model:
        faults.append(f"ema-decay: {method.name} has several models to average; set ema-decay=0")
    faults += privacy_faults(method, settings)
    faults += order_faults(chains(settings.round_deadline, settings.window_deadline, settings.rg))
    faults += settings.of(DiffusionSettings).faults()
    return faults


def _not_reproducible(settings: RunSettings, edge_choice: str) -> list[str]:
    """Return the settings that make a reproducible run nondeterministic, one line each, starting with the key.

    Parameters
    ----------
    settings : RunSettings
        The run's settings.
    edge_choice : str
        `edge-choice`, with "auto" resolved by the method.
    """
    if not settings.reproducible:
        return []
    faults = []
    if edge_choice == "shape":
        faults.append(
            "edge-choice: shape depends on measured link times, which reproducible=true rules out; "
            "use homogeneity, random or fixed"
        )
    if settings.of(LevelSettings).level_choice == "speed":
        faults.append(
            "level-choice: speed is measured, which reproducible=true rules out; use spread, device or memory"
        )
    noises = ("histogram_epsilon", "dp_sgd_noise", "dp_sgd_epsilon", "update_noise")
    private = settings.of(PrivacySettings)
    faults += [
        f"{key.replace('_', '-')}: the noise must be a secret of the devices, which reproducible=true rules out; "
        "set it to 0"
        for key in noises
        if getattr(private, key) > 0
    ]
    if settings.device not in ("auto", "cpu"):
        faults.append(
            f"device: {settings.device} may round differently every time; set device=cpu or reproducible=false"
        )
    return faults
