"""FjORD's ordered dropout (Horváth, Laskaridis et al., NeurIPS 2021, arXiv 2102.13451, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from espalier.methods.levels import parse_levels
from espalier.models.architecture import build, describe
from espalier.models.layers import Classifier
from espalier.models.presets import PRESETS
from espalier.models.variants import narrowed
from espalier.tasks.classification import cross_entropy, single_precision
from espalier.training.named_state import leading_block
from espalier.training.objectives import LocalRound, Objective, TrainingError


def section(width: float) -> str:
    """Return the section of the statistics of one width, e.g. ``"p0.4/"``."""
    return f"p{width:g}/"


@dataclass
class Narrow:
    """The network of one width within the client's.

    Attributes
    ----------
    width : float
        p, as a share of the whole network.
    network : nn.Module
        Its layers, on ``meta``: the tensors are given with every call.
    buffers : dict of str to Tensor
        Normalisation statistics of this width; a pass in training moves them.
    """

    width: float
    network: nn.Module
    buffers: dict[str, Tensor]

    def __call__(self, model: nn.Module, images: Tensor) -> list[Tensor]:
        """Return the logits that the leading slices of a model's parameters give, by exit.

        The slices are views: the gradient of each lands in its block of the model's parameter.
        """
        own = dict(model.named_parameters())
        tensors = {name: _corner(own[name], like) for name, like in self.network.named_parameters()}
        self.network.train(model.training)
        return single_precision(functional_call(self.network, tensors | self.buffers, (images,), strict=True))


class OrderedDropout(Objective):
    """Every batch trains the leading slice of a random width; it is a base loss of its own.

    For each batch p is drawn uniformly from the `levels` up to the client's own, p_max, one p for all
    layers; its first ceil(p C) units are trained by cross-entropy. With ``distillation`` every batch trains
    p_max by cross-entropy and then the drawn p towards softmax(z_pmax), which is a constant there: the
    paper's (1 - alpha) CE + alpha KL at alpha = T = 1. KL instead of the authors' cross-entropy between the
    two differs by the teacher's entropy alone, which has no gradient.

    Affine parameters of batch normalisation are shared by all widths, running statistics are not: those of
    width p are in the section "p0.4/" (:func:`section`), under the names of the network's own. The network's
    own statistics are neither used nor moved; a server that deploys a network of width p puts those of
    its section in their place.

    Weight decay acts on the whole held block, so also on what lies beyond the drawn p.
    """

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Build the narrower networks within the client's."""
        if not isinstance(model, Classifier):
            raise TrainingError("ordered dropout needs a classifier, whose layers come in several widths")
        whole = _whole(model, local.settings.model)
        spec, held = describe(whole), {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._widths: list[Narrow] = []
        for width in sorted(parse_levels(local.settings.levels)):
            network = build(narrowed(spec, width))
            shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
            if not all(_within(shape, held.get(name)) for name, shape in shapes.items()):
                break
            self._widths.append(Narrow(width, network, _statistics(network, model, local.aux, width)))
            fits = shapes == held
        if not self._widths or not fits:
            raise TrainingError(
                f"the received network has none of the widths levels={local.settings.levels} of "
                f"model={local.settings.model}"
            )
        self._teaches = local.settings.distillation

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the batch's loss; in evaluation the cross-entropy at p_max."""
        largest = self._widths[-1]
        drawn = self._draw(images.device, generator) if model.training else largest
        if not self._teaches:
            return cross_entropy(drawn(model, images), labels)
        taught_by = largest(model, images)
        total = cross_entropy(taught_by, labels)
        if drawn is largest:  # It would be its own teacher: KL and gradient are 0.
            return total
        divergences = [
            functional.kl_div(
                functional.log_softmax(z, 1),
                functional.log_softmax(teacher.detach(), 1),
                reduction="batchmean",
                log_target=True,
            )
            for z, teacher in zip(drawn(model, images), taught_by, strict=True)
        ]
        return total + torch.stack(divergences).sum()

    def extra(self) -> dict[str, np.ndarray]:
        """Return every width's running statistics."""
        return {
            section(narrow.width) + name: tensor.detach().cpu().numpy().copy()
            for narrow in self._widths
            for name, tensor in narrow.buffers.items()
        }

    def _draw(self, device: torch.device, generator: Generator) -> Narrow:
        index = torch.randint(len(self._widths), (1,), generator=generator, device=device)
        return self._widths[int(index)]


def _whole(model: Classifier, preset: str) -> nn.Module:
    """Return the network of full width that a client's is a part of, on meta.

    The widths are the preset's, because those of a narrow network, which are rounded up, do not say of what they are
    shares.
    """
    own, full = model.arguments, PRESETS[preset].arguments
    hidden = {name: full[name] for name in getattr(own, "HIDDEN", ()) if name in full}
    with torch.device("meta"):
        return type(model)(own.model_copy(update=hidden))  # type: ignore[call-arg]


def _statistics(
    network: nn.Module, model: nn.Module, aux: Mapping[str, np.ndarray], width: float
) -> dict[str, Tensor]:
    """Return a width's statistics: the received ones, else a slice of the network's own."""
    own, statistics = dict(model.named_buffers()), {}
    for name, like in network.named_buffers():
        received = aux.get(section(width) + name)
        if received is not None and received.shape != tuple(like.shape):
            raise TrainingError(
                f"the received statistics {section(width) + name!r} are {list(received.shape)}, "
                f"the network's {list(like.shape)}"
            )
        given = own[name].cpu().numpy() if received is None else received
        empty = torch.empty(like.shape, dtype=own[name].dtype, device=own[name].device)
        statistics[name] = leading_block(given, empty)
    return statistics


def _corner(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor[tuple(slice(0, length) for length in like.shape)]


def _within(shape: torch.Size, held: torch.Size | None) -> bool:
    return held is not None and len(shape) == len(held) and all(map(int.__le__, shape, held))
