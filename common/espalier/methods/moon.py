"""MOON: model-contrastive federated learning (Li, He, Song, CVPR 2021, arXiv 2103.16257)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from pydantic import Field

from espalier import lazy, models
from espalier.config.fields import NonNegative, Positive, SettingsGroup
from espalier.methods.base import CloudState, Inquiry, Method
from espalier.models.presets import task_of
from espalier.seeds import seed_for
from espalier.training.objectives import LocalResult, LocalRound, Objective, TrainingError
from espalier.wire.sections import Layouts, SectionId

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn
    from torch.nn import functional
    from torch.utils.hooks import RemovableHandle
else:
    torch, nn, functional = lazy.load("torch"), lazy.load("torch.nn"), lazy.load("torch.nn.functional")

#: Section of a U-Net's projection head, and prefix of the previous network in a client's state.
HEAD, STATE = SectionId("head"), "moon/"
#: Prefix of the projection head within the previous network.
STATE_HEAD = "head/"
#: Outputs of the projection head (the authors' code).
PROJECTION = 256


class MOON(Method):
    """Algorithm 1: the local loss adds −log( e^{cos(z, z_glob)/τ} / (e^{cos(z, z_glob)/τ} + e^{cos(z, z_prev)/τ}) ).

    z, z_glob and z_prev are the representations of the network in training, of the received one and of the
    client's own at its last participation. A classifier lies on top of its projection head, as in the paper. A
    U-Net's pooled mid-block features go through a separate head, which is averaged like the network.
    """

    class Settings(SettingsGroup):
        """The contrastive term."""

        moon_mu: NonNegative = Field(default=1.0, description="weight mu of the contrastive term")
        moon_temperature: Positive = Field(default=0.5, description="temperature of the contrastive term")

    name = "moon"
    uses = (Settings,)
    sticky_edge = True

    def initial(self, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Return the network; a classifier's with a projection head."""
        classifies = task_of(self.settings.model) == "classification"
        return models.initial_model(
            self.settings, image_shape, classes, projection=PROJECTION if classifies else 0
        )

    def before_run(self, state: CloudState, ask: Inquiry) -> None:
        """Add a projection head to a U-Net."""
        if task_of(self.settings.model) == "diffusion":
            state.put({HEAD: initial_head(mid_width(state.model()), self.settings.seed)})

    def objective(self, round_: int) -> Objective:
        """Return the task's loss and the contrastive term."""
        s = self.settings.of(MOON.Settings)
        return super().objective(round_) + ModelContrastiveTerm(s.moon_mu, s.moon_temperature)

    def returned(self, sent: Layouts, names: Sequence[str], metrics: Mapping[str, float]) -> Layouts:
        """Return the network's tensors and the head's."""
        return {**super().returned(sent, names, metrics), **{s: sent[s] for s in sent if s == HEAD}}


class ModelContrastiveTerm(Objective):
    """``mu`` times the model-contrastive loss.

    The received and the previous network are frozen and in evaluation mode. A client that participates for the first
    time, or whose network has changed its shapes since, uses the received network as its previous one: the term is
    then the constant mu log 2, without a gradient.

    On a classifier z is the input of the output layer: the output of the projection head where there is one. On a
    U-Net z is the mid-block's output, averaged over its pixels, after a separate projection head of the same kind;
    servers hold that head in the section "head" and average it. Its inputs are the noised images and time steps
    of the DDPM loss, because a U-Net is trained on no others: x_0 at t = 0 would cover one of T steps. z is
    captured in the base loss's forward pass, which saves a second pass and a second update of running statistics,
    so the base loss comes first in the sum.

    Parameters
    ----------
    mu, temperature : float
        Weight and temperature of the term.
    """

    def __init__(self, mu: float, temperature: float) -> None:
        self._mu, self._temperature = mu, temperature
        self._hooks: list[RemovableHandle] = []
        self._head: nn.Module | None = None
        self._captured: Tensor | None = None
        self._inputs: tuple[Tensor, ...] = ()

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Freeze the two networks to compare with, and capture the features of the one in training."""
        self._local = local
        self._release()
        self._head = (
            None
            if isinstance(model, models.SingleHead | models.ExitNetwork)
            else _received_head(model, local)
        )
        previous = _previous(model, self._head, local.state)
        self._global = _Frozen(model, self._head)
        self._previous = self._global if previous is None else _Frozen(model, self._head, previous)
        self._capture(model)

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of a U-Net's projection head."""
        return () if self._head is None else self._head.parameters()

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the term for the batch that the base loss just ran the network on."""
        if self._captured is None:
            raise RuntimeError("the contrastive term must come after the base loss in the sum")
        captured, self._captured = self._captured, None
        z = captured if self._head is None else self._head(captured.mean((2, 3)))
        inputs = (images,) if self._head is None else self._inputs
        with torch.no_grad():
            z_global = self._global(*inputs)
            z_previous = z_global if self._previous is self._global else self._previous(*inputs)
        return self._mu * contrastive_loss(z.float(), z_global.float(), z_previous.float(), self._temperature)

    def extra(self) -> dict[SectionId, dict[str, np.ndarray]]:
        """Return the trained projection head."""
        return {} if self._head is None else {HEAD: _arrays(self._head, "")}

    def end(self, model: nn.Module, result: LocalResult, sent: Mapping[str, Tensor]) -> dict[str, float]:
        """Store the trained network for the client's next participation."""
        state = self._local.state
        for name in [name for name in state if name.startswith(STATE)]:
            del state[name]
        state.update(_arrays(model, STATE))
        if self._head is not None:
            state.update(_arrays(self._head, STATE + STATE_HEAD))
        self._release()
        return {}

    def _capture(self, model: nn.Module) -> None:
        """Capture z, or the mid-block's output and the U-Net's inputs, in the base loss's forward pass."""
        self._captured = None

        def features(_: nn.Module, arguments: tuple[Any, ...], output: Any = None) -> None:
            self._captured = arguments[0] if output is None else output

        def inputs(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            self._inputs = arguments[:2]

        if self._head is None:
            self._hooks = [_output_layer(model).register_forward_pre_hook(features)]
        else:
            middle = cast(nn.Module, cast(Any, model).mid_block)
            self._hooks = [model.register_forward_pre_hook(inputs), middle.register_forward_hook(features)]

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def mid_width(model: nn.Module) -> int:
    """Return the number of output channels of a U-Net's mid-block, pruned or not."""
    return int(cast(Any, model).mid_block.resnets[-1].conv2.weight.shape[0])


def projection_head(width: int) -> nn.Sequential:
    """Return ``width -> width, ReLU, width -> 256`` with torch's initial weights."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, PROJECTION))


def initial_head(width: int, run_seed: int) -> dict[str, np.ndarray]:
    """Return the tensors of the initial projection head, the same on every machine.

    Parameters
    ----------
    width : int
        Result of :func:`mid_width` for the run's network.
    run_seed : int
        The run's `seed`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(run_seed, "cloud", 0, "projection head"))
        return _arrays(projection_head(width), "")


def mid_features(model: nn.Module, noisy: Tensor, times: Tensor) -> Tensor:
    """Run the lower half of a U-Net.

    Parameters
    ----------
    model : nn.Module
        A UNet2DModel; its up blocks are not used.
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
    return cast("Tensor", unet.mid_block(hidden, embedded))


def contrastive_loss(z: Tensor, z_global: Tensor, z_previous: Tensor, temperature: float) -> Tensor:
    """Return the mean contrastive loss of representations [B, F]; only z gets a gradient."""
    similar = [functional.cosine_similarity(z, other.detach(), dim=1) for other in (z_global, z_previous)]
    logits = torch.stack(similar, 1) / temperature
    return functional.cross_entropy(logits, torch.zeros(len(z), dtype=torch.int64, device=z.device))


class _Frozen:
    """A frozen network in evaluation mode that maps inputs to z."""

    def __init__(
        self, model: nn.Module, head: nn.Module | None, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        network, self._head = copy.deepcopy(model), copy.deepcopy(head)
        if tensors is not None:
            own = {n: t for n, t in tensors.items() if not n.startswith(STATE_HEAD)}
            network.load_state_dict(own)
            if self._head is not None:
                self._head.load_state_dict({n: tensors[STATE_HEAD + n] for n in self._head.state_dict()})
        network.eval().requires_grad_(False)
        if self._head is None:
            self._run: Callable[..., Tensor] = cast(Any, network).project
        else:
            cast(Any, network).up_blocks = nn.ModuleList()
            self._run = lambda noisy, times: self._project(mid_features(network, noisy, times))

    def _project(self, maps: Tensor) -> Tensor:
        return cast("Tensor", cast(Any, self._head)(maps.mean((2, 3))))

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self._run(*inputs)


def _received_head(model: nn.Module, local: LocalRound) -> nn.Module:
    """Return the received projection head, or the initial one if the servers sent none."""
    if not hasattr(model, "mid_block"):
        raise TrainingError(f"MOON has no representation of a {type(model).__name__}; choose another model")
    arrays = local.sections.get(HEAD) or initial_head(mid_width(model), local.settings.seed)
    head = projection_head(mid_width(model))
    try:
        head.load_state_dict({n: torch.from_numpy(np.array(a)) for n, a in arrays.items()})
    except RuntimeError as error:
        reason = str(error).partition("\n")[2].strip()
        raise TrainingError(f"the received projection head does not fit the network ({reason})") from None
    return head.to(next(model.parameters()).device)


def _previous(
    model: nn.Module, head: nn.Module | None, state: Mapping[str, np.ndarray]
) -> dict[str, Tensor] | None:
    """Return the tensors of the client's previous network and head; None without one of this shape."""
    wanted = dict(model.state_dict())
    if head is not None:
        wanted |= {STATE_HEAD + name: tensor for name, tensor in head.state_dict().items()}
    stored = {n.removeprefix(STATE): a for n, a in state.items() if n.startswith(STATE)}
    if {n: a.shape for n, a in stored.items()} != {n: tuple(t.shape) for n, t in wanted.items()}:
        return None
    return {name: torch.from_numpy(np.array(array)) for name, array in stored.items()}


def _output_layer(model: nn.Module) -> nn.Module:
    """Return the layer that reads z."""
    if isinstance(model, models.ExitNetwork):
        return model.exit(model.depth).classifier
    return cast("models.SingleHead", model).classifier


def _arrays(module: nn.Module, prefix: str) -> dict[str, np.ndarray]:
    return {
        prefix + name: tensor.detach().cpu().numpy().copy() for name, tensor in module.state_dict().items()
    }
