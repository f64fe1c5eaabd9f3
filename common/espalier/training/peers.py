"""Co-distillation: clients learn from stale copies of each other's networks, of whatever architectures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from espalier.errors import WireError
from espalier.models.architecture import build_with
from espalier.models.arrays import to_tensor
from espalier.training.forward_hooks import Overheard, RunningMean, classifier, single_answer
from espalier.training.objectives import LocalResult, LocalRound, Objective, TrainingError

#: Section of other clients' networks.
SECTION = "peer/"


class Peers(Objective):
    """Co-distillation: ``weight`` times the cross-entropy against the mean prediction of peers on the same batch.

    Anil et al., ICLR 2018 (arXiv 1804.03235), algorithm 1: the teacher is the mean of the *others'* softmax outputs;
    their networks are copies of some rounds ago, frozen. There is no term without peers or during the burn-in.

    Parameters
    ----------
    weight : float
        Weight of the term.
    burn_in : int
        First rounds of the run without the term.
    peers : callable
        Gives the others' networks in a round, of any architectures: :func:`received_peers`. They are put on the
        device and into eval mode, and never trained.
    """

    def __init__(
        self,
        weight: float,
        burn_in: int = 0,
        peers: Callable[[LocalRound], Iterable[nn.Module]] | None = None,
    ) -> None:
        self._weight, self._burn_in, self._peers = weight, burn_in, peers or received_peers
        self._outputs = Overheard()

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Freeze the peers, if their time has come."""
        network, device = classifier(model, "co-distillation"), next(model.parameters()).device
        self._mean = RunningMean()
        self._active = tuple(self._peers(local)) if local.round > self._burn_in else ()
        for peer in self._active:
            its = classifier(peer, "co-distillation").classes
            if its != network.classes:
                raise TrainingError(f"a peer's network has {its} classes, this client's {network.classes}")
            peer.to(device).eval().requires_grad_(False)
        self._outputs.listen(model)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the term for the batch that the base loss just ran the network on."""
        answer = self._outputs.take()
        if not self._active:
            return images.new_zeros(())
        with torch.no_grad():
            answers = [single_answer(peer(images), "co-distillation").softmax(1) for peer in self._active]
            teacher = torch.stack(answers).mean(0)
        value = functional.cross_entropy(single_answer(answer, "co-distillation"), teacher)
        self._mean.add(value)
        return self._weight * value

    def end(self, model: nn.Module, result: LocalResult, sent: Mapping[str, Tensor]) -> dict[str, float]:
        """Report the term."""
        self._outputs.release()
        return self._mean.report("peer-loss")


def received_peers(local: LocalRound) -> list[nn.Module]:
    """Build the other clients' networks of a round from their descriptions and tensors.

    Parameters
    ----------
    local : LocalRound
        The descriptions are its `peers`, the tensors its `aux` under "peer/CLIENT/TENSOR". The client's own network
        is left out.

    Raises
    ------
    WireError
        A network cannot be built; the message names its client.
    """
    networks = []
    for name, description in local.peers.items():
        if name == local.name:
            continue
        head = f"{SECTION}{name}/"
        arrays = {n.removeprefix(head): a for n, a in local.aux.items() if n.startswith(head)}
        try:
            networks.append(build_with(description, {n: to_tensor(a) for n, a in arrays.items()}))
        except ValueError as error:
            raise WireError("the servers", f"{name}'s network cannot be built ({error})") from error
    return networks
