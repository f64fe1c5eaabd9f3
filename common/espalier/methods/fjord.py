"""FjORD: ordered dropout (Horváth, Laskaridis et al., NeurIPS 2021, arXiv 2102.13451)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from espalier import lazy, models
from espalier.methods.base import CloudState, Deployed, Inquiry
from espalier.methods.levels import DistillationSettings, LevelSettings
from espalier.methods.submodels import SubModels, sliced
from espalier.models.presets import PRESETS
from espalier.tasks.classification import cross_entropy, single_precision
from espalier.training.named_state import leading_block
from espalier.training.objectives import LocalRound, Objective, TrainingError
from espalier.wire.payload import Layout, Weights
from espalier.wire.sections import MODEL, Layouts, SectionId, layouts_to_proto
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn
    from torch.nn import functional
else:
    torch, functional = lazy.load("torch"), lazy.load("torch.nn.functional")


#: Name of the sections that hold the widths' statistics; their members are widths.
WIDTH = "width"


def statistics(width: float) -> SectionId:
    """Return the section of the running statistics of one width."""
    return SectionId(WIDTH, f"{width:g}")


class FjORD(SubModels):
    """Algorithm 1.

    For every batch a client of width p_max trains the leading slice of a width p ≤ p_max, drawn uniformly, with
    distillation from the larger one. Servers average every coordinate by samples over the clients whose p_max
    includes it. Batch normalisation has statistics for each width, in a section of their own, which are updated by
    the clients that train the width.
    """

    name = "fjord"
    uses = (LevelSettings, DistillationSettings)

    def variant(self, architecture: pb.ArchitectureSpec, level: float) -> pb.ArchitectureSpec:
        """Return the network of a width."""
        return models.narrowed(architecture, level)

    def before_run(self, state: CloudState, ask: Inquiry) -> None:
        """Add the statistics of every width."""
        for width in self.settings.of(LevelSettings).shares:
            spec = self.variant(state.architecture, width)
            own = sliced(state.weights, spec).views()
            if buffers := {t.name: own[t.name] for t in spec.tensors if t.buffer}:
                state.put({statistics(width): buffers})

    def view(self, state: CloudState, key: str) -> pb.View:
        """Return the network of a width and the statistics of all widths up to it."""
        spec = self.variant(state.architecture, float(key))
        layouts = {MODEL: Layout.from_proto(spec.tensors, "cloud")}
        layouts |= {
            s: layout
            for s, layout in state.payload.layouts.items()
            if s.name == WIDTH and float(s.member) <= float(key)
        }
        return pb.View(architecture=spec, sections=layouts_to_proto(layouts))

    def objective(self, round_: int) -> Objective:
        """Return the loss of ordered dropout."""
        return OrderedDropout()

    def returned(self, sent: Layouts, names: Sequence[str], metrics: Mapping[str, float]) -> Layouts:
        """Return all tensors: network and statistics."""
        return {s: layout for s, layout in sent.items() if s.name in (MODEL.name, WIDTH)}

    def deployed(self, state: CloudState, ask: Inquiry) -> list[Deployed]:
        """Return the network of every width with the statistics of that width."""
        found: list[Deployed] = []
        for width in self.settings.of(LevelSettings).shares:
            spec = self.variant(state.architecture, width)
            arrays = sliced(state.weights, spec).views()
            arrays |= state.section(statistics(width))
            label = "global" if width == 1 else f"level {width:g}"
            found.append(Deployed(label, spec, Weights.pack(arrays), at_clients=not found))
        return found


class OrderedDropout(Objective):
    """Every batch trains the leading slice of a random width. It replaces the task's loss.

    For each batch p is drawn uniformly from the `levels` up to the client's p_max, one p for all layers; the first
    ceil(p C) units of each layer are trained by cross-entropy. With ``distillation`` every batch trains p_max by
    cross-entropy and the drawn p towards softmax(z_pmax), a constant there: the paper's (1 - alpha) CE + alpha KL with
    alpha = T = 1. The authors use the cross-entropy between the two outputs, which differs from KL by the teacher's
    entropy only, a constant.

    All widths share the affine parameters of batch normalisation but not its running statistics: those of width p
    are in a section of their own (:func:`statistics`), under the names of the network's own. The network's own
    statistics are neither used nor updated; a server that deploys a network of width p replaces them by those of
    the section.

    Weight decay acts on the client's whole network, so also on units beyond the drawn p.
    """

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Build the narrower networks inside the client's."""
        if not isinstance(model, models.Classifier):
            raise TrainingError("ordered dropout needs a classifier, whose layers come in several widths")
        whole = _whole(model, local.settings.model)
        spec, held = (
            models.describe(whole),
            {name: tensor.shape for name, tensor in model.state_dict().items()},
        )
        self._widths: list[Slice] = []
        for width in sorted(local.settings.of(LevelSettings).shares):
            network = models.build(models.narrowed(spec, width))
            shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
            if not all(_within(shape, held.get(name)) for name, shape in shapes.items()):
                break
            given = local.sections.get(statistics(width), {})
            self._widths.append(Slice(width, network, _buffers(network, model, given)))
            fits = shapes == held
        if not self._widths or not fits:
            raise TrainingError(
                f"the received network has none of the widths levels={local.settings.of(LevelSettings).levels} of "
                f"model={local.settings.model}"
            )
        self._distills = local.settings.of(DistillationSettings).distillation

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the batch's loss; in evaluation the cross-entropy at p_max."""
        largest = self._widths[-1]
        drawn = self._draw(images.device, generator) if model.training else largest
        if not self._distills:
            return cross_entropy(drawn(model, images), labels)
        teacher_logits = largest(model, images)
        total = cross_entropy(teacher_logits, labels)
        if drawn is largest:  # its own teacher: KL and gradient are 0
            return total
        divergences = [
            functional.kl_div(
                functional.log_softmax(z, 1),
                functional.log_softmax(teacher.detach(), 1),
                reduction="batchmean",
                log_target=True,
            )
            for z, teacher in zip(drawn(model, images), teacher_logits, strict=True)
        ]
        return total + torch.stack(divergences).sum()

    def extra(self) -> dict[SectionId, dict[str, np.ndarray]]:
        """Return every width's running statistics."""
        return {
            statistics(part.width): {
                name: tensor.detach().cpu().numpy().copy() for name, tensor in part.buffers.items()
            }
            for part in self._widths
            if part.buffers
        }

    def _draw(self, device: torch.device, generator: Generator) -> Slice:
        index = torch.randint(len(self._widths), (1,), generator=generator, device=device)
        return self._widths[int(index)]


@dataclass
class Slice:
    """The leading slice of one width of a client's network.

    Attributes
    ----------
    width : float
        p, as a share of the whole network.
    network : nn.Module
        Its layers, on ``meta``: every call passes the tensors.
    buffers : dict of str to Tensor
        Normalisation statistics of this width, updated by passes in training mode.
    """

    width: float
    network: nn.Module
    buffers: dict[str, Tensor]

    def __call__(self, model: nn.Module, images: Tensor) -> list[Tensor]:
        """Return the logits, by exit, of the leading slices of a model's parameters.

        The slices are views, so gradients are added to the blocks of the model's parameters.
        """
        own = dict(model.named_parameters())
        tensors = {name: _corner(own[name], like) for name, like in self.network.named_parameters()}
        self.network.train(model.training)
        return single_precision(
            torch.func.functional_call(self.network, tensors | self.buffers, (images,), strict=True)
        )


def _whole(model: models.Classifier, preset: str) -> nn.Module:
    """Return the full-width network of a client's sub-network, on meta.

    The widths are the preset's, because those of a narrow network are rounded up and do not determine the full ones.
    """
    own, full = model.arguments, PRESETS[preset].arguments
    hidden = {name: full[name] for name in getattr(own, "HIDDEN", ()) if name in full}
    with torch.device("meta"):
        return type(model)(own.model_copy(update=hidden))  # type: ignore[call-arg]


def _buffers(network: nn.Module, model: nn.Module, received: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Return the statistics of a width: the received ones, or a slice of the network's own."""
    own, found = dict(model.named_buffers()), {}
    for name, like in network.named_buffers():
        given = received.get(name)
        if given is not None and given.shape != tuple(like.shape):
            raise TrainingError(
                f"the received statistics {name!r} are {list(given.shape)}, the network's {list(like.shape)}"
            )
        empty = torch.empty(like.shape, dtype=own[name].dtype, device=own[name].device)
        found[name] = leading_block(own[name].cpu().numpy() if given is None else given, empty)
    return found


def _corner(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor[tuple(slice(0, length) for length in like.shape)]


def _within(shape: torch.Size, held: torch.Size | None) -> bool:
    return held is not None and len(shape) == len(held) and all(map(int.__le__, shape, held))
