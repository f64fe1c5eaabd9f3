"""FedAvg over the tree: sample-weighted means at both tiers (McMahan et al. 2017, arXiv 1602.05629)."""

from __future__ import annotations

from espalier.methods.base import Method


class FedAvg(Method):
    """Clients train E epochs; edges and the cloud average by samples. With rg=1 this is flat FedAvg."""

    name = "fedavg"
    per_example_loss = True
