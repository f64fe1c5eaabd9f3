"""Methods that are FedAvg with one axis changed: who is picked, or how updates are coded."""

from __future__ import annotations

from espalier.methods.fedavg import FedAvg


class PowerOfChoice(FedAvg):
    """FedAvg over the clients of largest loss (Cho, Wang, Joshi, AISTATS 2022, arXiv 2010.01243).

    Candidates are drawn ∝ n_k, so the mean over those picked is plain. `selection` = cpow-d, rpow-d
    and `adaptive-candidates` are the paper's variants.
    """

    name = "power-of-choice"
    own_selection = "pow-d"


class DivFL(FedAvg):
    """FedAvg over clients whose gradients stand for everybody's (Balakrishnan et al., ICLR 2022)."""

    name = "divfl"
    own_selection = "divfl"


class FedPAQ(FedAvg):
    """FedAvg with quantised differences, uniformly weighted (Reisizadeh et al., AISTATS 2020, arXiv 1909.13014).

    The server adds (1/r) Σ Q(y_k − w); local steps between two exchanges are `local-steps`.
    """

    name = "fedpaq"
    own_codec = "qsgd"
    own_weighting = "uniform"
