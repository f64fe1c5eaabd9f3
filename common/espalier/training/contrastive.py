"""MOON's model-contrastive term (Li, He and Song, CVPR 2021, arXiv 2103.16257), on classifiers and on U-Nets.

A client's representation z of its images is drawn to the received network's, z_glob, and away from that of its
own network at its last participation, z_prev:
``-log( e^{cos(z, z_glob) / tau} / (e^{cos(z, z_glob) / tau} + e^{cos(z, z_prev) / tau}) )``.

On a classifier z is what its output layer reads: the projection head's output where there is one. On a U-Net z is
the mid-block's output, averaged over its pixels, through a projection head of the same kind. That head is no part
of the network: the servers hold it in the section "head/" and average it with the clients' others. The images
are the noised ones of the DDPM term and their times, because a U-Net sees no others: an x_0 at t = 0 would shape
one of T steps. z is caught while the base loss runs the network, which saves a second pass (and a second move of
running statistics), so the base loss comes first in the sum.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from espalier.models.exits import ExitNetwork
from espalier.models.layers import SingleHead
from espalier.seeds import seed_for
from espalier.training.objectives import LocalResult, LocalRound, Objective, TrainingError

#: Section of the U-Net's projection head, and prefix of the former network in a client's state.
SECTION, KEPT = "head/", "moon/"
#: Width of z on a U-Net, the paper's.
PROJECTION = 256


def mid_width(model: nn.Module) -> int:
    """Return the channels of a U-Net's mid-block, pruned or not."""
    return int(cast(Any, model).mid_block.resnets[-1].conv2.weight.shape[0])


def projection_head(width: int) -> nn.Sequential:
    """Return ``width -> width, ReLU, width -> 256`` with torch's initial weights."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, PROJECTION))


def initial_head(width: int, run_seed: int) -> dict[str, np.ndarray]:
    """Return the head a run starts from, by full name ("head/0.weight"): the same for everybody.

    Parameters
    ----------
    width : int
        What :func:`mid_width` says of the run's network.
    run_seed : int
        The run's `seed`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(run_seed, "cloud", 0, "projection head"))
        return _arrays(projection_head(width), SECTION)


def mid_features(model: nn.Module, noisy: Tensor, times: Tensor) -> Tensor:
    """Run the lower half of a U-Net.

    Parameters
    ----------
    model : nn.Module
        A UNet2DModel; its way up is not used.
    noisy : Tensor
        Noised images [B, C, H, W].
    times : Tensor
        Their steps, int64 [B].

    Returns
    -------
    Tensor
        The mid-block's output [B, F, h, w].
    """
    unet = cast(Any, model)
    embedded = unet.time_embedding(unet.time_proj(times).to(unet.dtype))
    hidden = unet.conv_in(noisy)
    for block in unet.down_blocks:
        hidden, _ = block(hidden_states=hidden, temb=embedded)
    return cast(Tensor, unet.mid_block(hidden, embedded))


def contrast(z: Tensor, z_global: Tensor, z_former: Tensor, temperature: float) -> Tensor:
    """Return the mean contrastive loss of representations [B, F]; only z gets a gradient."""
    similar = [functional.cosine_similarity(z, other.detach(), dim=1) for other in (z_global, z_former)]
    logits = torch.stack(similar, 1) / temperature
    return functional.cross_entropy(logits, torch.zeros(len(z), dtype=torch.int64, device=z.device))


class Contrastive(Objective):
    """``mu`` times the model-contrastive loss.

    The received and the former network are frozen and in eval mode. A client that takes part for the first time,
    or whose network has other shapes than the last time, takes the received one as its former one: the term is
    then mu log 2, without a gradient, as if it were absent.

    Parameters
    ----------
    mu, temperature : float
        Weight and temperature of the term.
    """

    def __init__(self, mu: float, temperature: float) -> None:
        self._mu, self._temperature = mu, temperature
        self._hooks: list[RemovableHandle] = []
        self._head: nn.Module | None = None
        self._caught: Tensor | None = None
        self._seen: tuple[Tensor, ...] = ()

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Freeze the two networks to compare with, and listen to the one in training."""
        self._local = local
        self._release()
        self._head = None if isinstance(model, SingleHead | ExitNetwork) else _received_head(model, local)
        former = _former(model, self._head, local.state)
        self._global = _Frozen(model, self._head)
        self._former = self._global if former is None else _Frozen(model, self._head, former)
        self._listen(model)

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the U-Net's projection head's."""
        return () if self._head is None else self._head.parameters()

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the term for the batch that the base loss just ran the network on."""
        if self._caught is None:
            raise RuntimeError("the contrastive term comes behind the base loss in the sum")
        caught, self._caught = self._caught, None
        z = caught if self._head is None else self._head(caught.mean((2, 3)))
        seen = (images,) if self._head is None else self._seen
        with torch.no_grad():
            z_global = self._global(*seen)
            z_former = z_global if self._former is self._global else self._former(*seen)
        return self._mu * contrast(z.float(), z_global.float(), z_former.float(), self._temperature)

    def extra(self) -> dict[str, np.ndarray]:
        """Return the trained projection head."""
        return {} if self._head is None else _arrays(self._head, SECTION)

    def end(self, model: nn.Module, result: LocalResult, sent: Mapping[str, Tensor]) -> dict[str, float]:
        """Keep the trained network for the client's next participation."""
        state = self._local.state
        for name in [name for name in state if name.startswith(KEPT)]:
            del state[name]
        state.update(_arrays(model, KEPT))
        if self._head is not None:
            state.update(_arrays(self._head, KEPT + SECTION))
        self._release()
        return {}

    def _listen(self, model: nn.Module) -> None:
        """Catch what the base loss's pass computes on its way."""
        self._caught = None

        def caught(_: nn.Module, arguments: tuple[Any, ...], output: Any = None) -> None:
            self._caught = arguments[0] if output is None else output

        def seen(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            self._seen = arguments[:2]

        if self._head is None:
            self._hooks = [_output_layer(model).register_forward_pre_hook(caught)]
        else:
            middle = cast(nn.Module, cast(Any, model).mid_block)
            self._hooks = [model.register_forward_pre_hook(seen), middle.register_forward_hook(caught)]

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class _Frozen:
    """A network to compare with: frozen, in eval mode, from images to z."""

    def __init__(
        self, model: nn.Module, head: nn.Module | None, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        network, self._head = copy.deepcopy(model), copy.deepcopy(head)
        if tensors is not None:
            own = {n: t for n, t in tensors.items() if not n.startswith(SECTION)}
            network.load_state_dict(own)
            if self._head is not None:
                self._head.load_state_dict({n: tensors[SECTION + n] for n in self._head.state_dict()})
        network.eval().requires_grad_(False)
        if self._head is None:
            self._run: Callable[..., Tensor] = cast(Any, network).project
        else:
            cast(Any, network).up_blocks = nn.ModuleList()
            self._run = lambda noisy, times: self._project(mid_features(network, noisy, times))

    def _project(self, maps: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, self._head)(maps.mean((2, 3))))

    def __call__(self, *seen: Tensor) -> Tensor:
        return self._run(*seen)


def _received_head(model: nn.Module, local: LocalRound) -> nn.Module:
    """Return the servers' projection head, or the one a run starts from where they have none yet."""
    if not hasattr(model, "mid_block"):
        raise TrainingError(f"MOON has no representation of a {type(model).__name__}; choose another model")
    given = {n: a for n, a in local.aux.items() if n.startswith(SECTION)}
    arrays = given or initial_head(mid_width(model), local.settings.seed)
    head = projection_head(mid_width(model))
    try:
        head.load_state_dict(
            {n.removeprefix(SECTION): torch.from_numpy(np.array(a)) for n, a in arrays.items()}
        )
    except RuntimeError as error:
        reason = str(error).partition("\n")[2].strip()
        raise TrainingError(f"the received projection head does not fit the network ({reason})") from None
    return head.to(next(model.parameters()).device)


def _former(
    model: nn.Module, head: nn.Module | None, state: Mapping[str, np.ndarray]
) -> dict[str, Tensor] | None:
    """Return the network of the client's last participation with its head; None if there is none of this shape."""
    wanted = dict(model.state_dict())
    if head is not None:
        wanted |= {SECTION + name: tensor for name, tensor in head.state_dict().items()}
    kept = {n.removeprefix(KEPT): a for n, a in state.items() if n.startswith(KEPT)}
    if {n: a.shape for n, a in kept.items()} != {n: tuple(t.shape) for n, t in wanted.items()}:
        return None
    return {name: torch.from_numpy(np.array(array)) for name, array in kept.items()}


def _output_layer(model: nn.Module) -> nn.Module:
    """Return the layer whose input is z."""
    if isinstance(model, ExitNetwork):
        return model.exit(model.depth).classifier
    return cast(SingleHead, model).classifier


def _arrays(module: nn.Module, prefix: str) -> dict[str, np.ndarray]:
    return {
        prefix + name: tensor.detach().cpu().numpy().copy() for name, tensor in module.state_dict().items()
    }
