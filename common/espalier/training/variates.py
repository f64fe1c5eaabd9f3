"""SCAFFOLD's control variates (Karimireddy et al., ICML 2020, arXiv 1910.06378, algorithm 1, option II)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Generator, Tensor, nn

from espalier.training.named_state import on, read_blocks, trained, write_blocks
from espalier.training.objectives import LocalResult, LocalRound, Objective

#: Section of the server's c, and prefix of the c_k in a client's state.
SECTION, KEPT = "control/", "scaffold/"


class ControlVariates(Objective):
    """Every step goes along ``g(theta) - c_k + c``; then ``c_k <- c_k - c + (w - theta_k) / (K eta)``.

    c and c_k are over parameters only and start at zero, never at the weights. K eta is the sum of the
    learning rates that were applied, so it is right with a schedule too; the reply carries it as "lr-sum", and the
    server rebuilds the change of c_k, ``-c + (w - theta_k) / (K eta)``, from it and from the model it reads, which is
    the theta_k used here. With momentum, weight decay or clipping c_k is an estimate that includes them; with
    Adam it is none of a gradient, so a method asks for SGD (``LocalRound.optimizer``).
    """

    depends_on = "weights"

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Take c and c_k."""
        parameters = trained(model)
        self._local = local
        self._common = read_blocks(local.aux, SECTION, parameters)
        self._own = read_blocks(local.state, KEPT, parameters)
        self._correction = {name: c - self._own[name] for name, c in self._common.items()}

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return 0: the correction is to the gradients."""
        return images.new_zeros(())

    def after_backward(self, model: nn.Module) -> None:
        """Add c - c_k to the gradients."""
        for name, parameter in trained(model).items():
            correction = self._correction[name]
            if parameter.grad is None:
                parameter.grad = correction.clone()
            else:
                parameter.grad += correction

    def end(self, model: nn.Module, result: LocalResult, sent: Mapping[str, Tensor]) -> dict[str, float]:
        """Renew c_k; report K eta."""
        received = self._local.received
        renewed = {
            name: c_k
            - self._common[name]
            + (on(model, received, name) - on(model, sent, name)) / result.lr_sum
            for name, c_k in self._own.items()
        }
        write_blocks(self._local.state, KEPT, renewed)
        return {"lr-sum": result.lr_sum}
