"""Configuration checks that span method, model, selection and codec."""

from __future__ import annotations

from espalier.config.reproducible import contradictions as not_reproducible
from espalier.config.run_config import RunConfig
from espalier.methods.base import Method
from espalier.methods.levels import parse_levels
from espalier.methods.privacy_rules import privacy_faults
from espalier.models.presets import MODELS, family_of, task_of


def contradictions(method: type[Method], settings: RunConfig) -> list[str]:
    """Return the faults of combinations of settings, one line each, key first."""
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
        if parse_levels(settings.levels)[0] != 1:
            faults.append(
                "levels: the largest must be 1, otherwise a part of the network is not trained; add it, e.g. 1,0.5"
            )
        if selection == "divfl":
            faults.append(
                f"selection: divfl compares gradients of the whole network, clients of {method.name} have parts of it; "
                "use pow-d or uniform"
            )
    faults += not_reproducible(settings, method.chosen(settings, "edge_choice"))
    if settings.ema_decay and not method.has_one_model:
        faults.append(f"ema-decay: {method.name} has several models to average; set ema-decay=0")
    faults += privacy_faults(method, settings)
    return faults
