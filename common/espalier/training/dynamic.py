"""FedDyn's dynamic regulariser (Acar et al., ICLR 2021, arXiv 2111.04263, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn

from espalier.training.named_state import on, read_blocks, trained, write_blocks
from espalier.training.objectives import LocalResult, LocalRound, Objective
from espalier.training.proximal import SquaredDistance

#: Prefix of the g_k in a client's state.
KEPT = "dyn/"


class Dynamic(Objective):
    """``-<theta, g_k> + alpha/2 ||theta - w||^2``, then ``g_k <- g_k - alpha (theta_k - w)``.

    g_k starts at zero and tends to the gradient of the client's own loss at the common optimum, so that every
    client's regularised loss has its minimum there. It is over parameters only. A sub-network's g_k is
    the leading block of what the client keeps (DepthFL), the rest waits for a round that trains it. theta_k
    is the model as the server reads it, so that the server's h stays the mean of all g_k.

    Parameters
    ----------
    alpha : float
        Weight of the regulariser, the server's alpha too.
    """

    depends_on = "weights"

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Take the received parameters and g_k."""
        self._local = local
        self._distance = SquaredDistance(model, local)
        self._kept = read_blocks(local.state, KEPT, trained(model))
        self._linear = torch.cat([g.flatten() for g in self._kept.values()])

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the regulariser's value; it does not depend on the batch."""
        flat = self._distance.flat()
        return 0.5 * self._alpha * self._distance.squared(flat) - (flat * self._linear).sum()

    def end(self, model: nn.Module, result: LocalResult, sent: Mapping[str, Tensor]) -> dict[str, float]:
        """Renew g_k."""
        received = self._local.received
        renewed = {
            name: g - self._alpha * (on(model, sent, name) - on(model, received, name))
            for name, g in self._kept.items()
        }
        write_blocks(self._local.state, KEPT, renewed)
        return {}
