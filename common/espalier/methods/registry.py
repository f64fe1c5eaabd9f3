"""The methods by name: a new method is a new file and an entry here."""

from __future__ import annotations

from espalier.config.run_settings import RunSettings
from espalier.errors import ConfigError
from espalier.methods.base import Method
from espalier.methods.cfl import CFL
from espalier.methods.codistillation import CoDistillation
from espalier.methods.depthfl import DepthFL
from espalier.methods.divfl import DivFL
from espalier.methods.fd import FD
from espalier.methods.fedavg import FedAvg
from espalier.methods.feddiffuse import FedDiffuse
from espalier.methods.feddyn import FedDyn
from espalier.methods.fedktl import FedKTL
from espalier.methods.fedpaq import FedPAQ
from espalier.methods.fedphd import FedPhD, FedPhDOneShot
from espalier.methods.fedproto import FedProto
from espalier.methods.fedprox import FedProx
from espalier.methods.fjord import FjORD
from espalier.methods.heterofl import HeteroFL
from espalier.methods.ifca import IFCA
from espalier.methods.inclusivefl import InclusiveFL
from espalier.methods.moon import MOON
from espalier.methods.phoenix import Phoenix
from espalier.methods.power_of_choice import PowerOfChoice
from espalier.methods.qfedavg import QFedAvg
from espalier.methods.scaffold import SCAFFOLD
from espalier.methods.splitmix import SplitMix

METHODS: dict[str, type[Method]] = {
    m.name: m
    for m in (
        # whole models
        FedAvg,
        FedProx,
        MOON,
        SCAFFOLD,
        FedDyn,
        QFedAvg,
        PowerOfChoice,
        DivFL,
        FedPAQ,
        # diffusion models
        FedPhD,
        FedPhDOneShot,
        FedDiffuse,
        Phoenix,
        # sub-models
        HeteroFL,
        FjORD,
        DepthFL,
        InclusiveFL,
        SplitMix,
        # clusters
        IFCA,
        CFL,
        # knowledge between unlike models
        FD,
        FedProto,
        CoDistillation,
        FedKTL,
    )
}


def method_names() -> tuple[str, ...]:
    """Return the values that `-c method=…` accepts."""
    return tuple(sorted(METHODS))


def create_method(settings: RunSettings) -> Method:
    """Return the method of a run.

    Raises
    ------
    ConfigError
        If the method is unknown.
    """
    if settings.method not in METHODS:
        raise ConfigError(f"method={settings.method!r} is unknown; choose one of {', '.join(method_names())}")
    return METHODS[settings.method](settings)
