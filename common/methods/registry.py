"""The methods by name: a new method is a new file and a line here."""

from __future__ import annotations

from common.errors import ConfigError
from common.methods.base import Method
from common.methods.cfl import CFL
from common.methods.codistillation import CoDistillation
from common.methods.compositions import DivFL, FedPAQ, PowerOfChoice
from common.methods.depthfl import DepthFL
from common.methods.fd import FD
from common.methods.fedavg import FedAvg
from common.methods.feddiffuse import FedDiffuse
from common.methods.feddyn import FedDyn
from common.methods.fedktl import FedKTL
from common.methods.fedphd import FedPhD, FedPhDOneShot
from common.methods.fedproto import FedProto
from common.methods.fedprox import FedProx
from common.methods.fjord import FjORD
from common.methods.heterofl import HeteroFL
from common.methods.ifca import IFCA
from common.methods.inclusivefl import InclusiveFL
from common.methods.moon import MOON
from common.methods.phoenix import Phoenix
from common.methods.qfedavg import QFedAvg
from common.methods.scaffold import SCAFFOLD
from common.methods.splitmix import SplitMix
from common.run.config import RunConfig

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
    """Return the names that `-c method=…` accepts."""
    return tuple(sorted(METHODS))


def create_method(settings: RunConfig) -> Method:
    """Return the method a run asks for.

    Raises
    ------
    ConfigError
        If there is none of that name.
    """
    if settings.method not in METHODS:
        raise ConfigError(f"method={settings.method!r} is unknown; choose one of {', '.join(method_names())}")
    return METHODS[settings.method](settings)
