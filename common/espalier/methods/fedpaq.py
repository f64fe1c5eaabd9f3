"""FedPAQ: periodic averaging with quantised differences (Reisizadeh et al., AISTATS 2020, arXiv 1909.13014)."""

from __future__ import annotations

from espalier.methods.fedavg import FedAvg


class FedPAQ(FedAvg):
    """Algorithm 1: FedAvg over quantised differences, uniformly weighted.

    Participants send Q(y_k − w) and the server adds (1/r) Σ Q(y_k − w). The number of local steps between two
    exchanges is `local-steps`.
    """

    name = "fedpaq"
    own_codec = "qsgd"
    own_weighting = "uniform"
