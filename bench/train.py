"""A client's local training against the loop that a person would write, and a pruned network against the dense one.

All sides train the same network on as many images with the same optimiser, turn about in one process, in an order
that is reversed from turn to turn. A ratio is the median over the turns of that within a turn: what slows a
machine down for a minute slows both sides of it.

With ``--variants`` our client also trains the network with its weights in channels_last order, compiled by
torch.compile, and (U-Nets) with diffusers' own attention: what each gains, and after how many steps compiling has
paid.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from bench.report import Outcome, Target, parser, show

if TYPE_CHECKING:
    import torch
    from torch import nn

    from espalier.data.imageset import ImageSet
    from espalier.methods.run_config import RunConfig

ABOUT = "Images a second of a client's local training, against a plain PyTorch loop, dense and pruned"
RATIO = 0.2
_VARIANTS = (CHANNELS_LAST, COMPILED, PLAIN_ATTENTION) = ("channels_last", "compiled", "diffusers_attention")


@dataclass(frozen=True)
class Case:
    """A network to train, how often all sides are built anew, and for how many turns and steps.

    Where a network comes to lie in memory makes it up to a tenth faster or slower than its copy, for as long as
    it lies there; so a case has several starts. An even number of turns has each order equally often. `threads` of
    torch; 0 is its own choice.
    """

    model: str
    shape: tuple[int, int, int]
    batch: int
    steps: int
    turns: int
    starts: int
    threads: int = 0

    @property
    def label(self) -> str:
        """Name in the table."""
        size = " x ".join(map(str, self.shape))
        return f"{self.model}, {size}, batches of {self.batch}" + (
            ", one thread" if self.threads == 1 else ""
        )


CASES = {
    "cpu": [
        # The demonstration's four clients have a thread each on a machine of up to seven cores.
        Case("unet-tiny", (1, 8, 8), 32, 12, 8, starts=4, threads=1),
        Case("unet-tiny", (1, 8, 8), 32, 12, 8, starts=4),
        Case("unet-small", (1, 28, 28), 16, 4, 4, starts=5),
        Case("unet-paper", (3, 32, 32), 8, 3, 4, starts=3),
        Case("cnn", (1, 28, 28), 32, 100, 6, starts=8),
    ],
    "cuda": [
        Case("unet-paper", (3, 32, 32), 128, 20, 4, starts=3),
        Case("unet-small", (1, 28, 28), 128, 20, 4, starts=3),
        Case("cnn", (1, 28, 28), 128, 100, 4, starts=3),
    ],
}
TINY = [Case("unet-tiny", (1, 8, 8), 8, 2, 1, starts=2)]


@dataclass(frozen=True)
class Seconds:
    """Wall and processor seconds of every turn of every side, and the wall seconds of a compiled network's first."""

    wall: Mapping[str, Sequence[float]]
    processor: Mapping[str, Sequence[float]]
    first: float | None = None


def measure(cases: Sequence[Case], device: str, *, variants: bool = False) -> Outcome:
    """Train every case on a device, ours and plain, dense and (U-Nets) pruned, and in variants if asked for."""
    outcome = Outcome()
    for case in cases:
        with torch_threads(case.threads):
            took = _seconds(case, device, variants)
        wall = took.wall
        rates = {n: case.batch * case.steps / statistics.median(taken) for n, taken in wall.items()}
        loop = over(wall["client"], wall["loop"])
        row: dict[str, Any] = {
            "network": case.label,
            "device": device,
            "client_images_s": rates["client"],
            "loop_images_s": rates["loop"],
            "client_over_loop": loop,
            "same_by_cpu_s": over(took.processor["client"], took.processor["loop"]),
        }
        outcome.targets.append(Target.at_least(f"{case.label}: client over plain loop", loop, 0.97))
        if "pruned" in wall:
            pruned = over(wall["pruned"], wall["client"])
            row |= {"pruned_images_s": rates["pruned"], "pruned_over_dense": pruned}
            outcome.targets.append(
                Target.at_least(f"{case.label}: pruned at {RATIO} over dense", pruned, 1.4)
            )
        row |= {f"{name}_over_client": over(wall[name], wall["client"]) for name in wall if name in _VARIANTS}
        if took.first is not None:
            row |= compiling(case, took)
        outcome.rows.append(row)
    outcome.notes.append(
        "one turn of each after the other, the order reversed from turn to turn; ratios are medians of those "
        "within a turn; pruned: our client on both sides"
    )
    return outcome


def compiling(case: Case, took: Seconds) -> dict[str, float | None]:
    """Return what compiling takes, and after how many steps it has paid (None: never)."""
    usual, compiled = (statistics.median(took.wall[name]) for name in ("client", COMPILED))
    spent, saved = (took.first or 0.0) - compiled, (usual - compiled) / case.steps
    return {"compile_s": spent, "compile_pays_after_steps": spent / saved if saved > 0 else None}


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads (0: as it does) and give it back its own."""
    import torch

    own = torch.get_num_threads()
    torch.set_num_threads(count or own)
    try:
        yield
    finally:
        torch.set_num_threads(own)


def over(seconds: Sequence[float], others: Sequence[float]) -> float:
    """Return how much faster one side is than another: the median over the turns of that within a turn."""
    return statistics.median(other / own for own, other in zip(seconds, others, strict=True))


def take_turns(
    turns: Mapping[str, Callable[[int], None]], count: int, ready: Callable[[], None] = lambda: None
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Let all sides take one turn after the other, `count` times, each time in the reverse of the last order.

    Parameters
    ----------
    turns : mapping of str to callable
        Each side's turn; it gets the turn's number.
    count : int
        Turns that count; one before them warms up.
    ready : callable
        Waits for what is still under way on a device.

    Returns
    -------
    tuple of dict of str to list of float
        Wall and processor seconds of every side's turns.
    """
    wall: dict[str, list[float]] = {name: [] for name in turns}
    processor: dict[str, list[float]] = {name: [] for name in turns}
    order = list(turns)
    for number in range(count + 1):
        for name in order:
            ready()
            began, worked = time.perf_counter(), time.process_time()
            turns[name](number)
            ready()
            if number:
                wall[name].append(time.perf_counter() - began)
                processor[name].append(time.process_time() - worked)
        order.reverse()
    return wall, processor


def _seconds(case: Case, device: str, variants: bool) -> Seconds:
    """Train a case in every way, from every start."""
    wall: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    first = None
    for _ in range(1 if variants else case.starts):
        turns = sides(case, device, variants)
        if variants:
            began = time.perf_counter()
            turns[COMPILED](0)
            first = time.perf_counter() - began
        for total, taken in zip(
            (wall, processor), take_turns(turns, case.turns, lambda: _wait(device)), strict=True
        ):
            for name, seconds in taken.items():
                total.setdefault(name, []).extend(seconds)
    return Seconds(wall, processor, first)


def sides(case: Case, device: str, variants: bool) -> dict[str, Callable[[int], None]]:
    """Build every side's network and return what trains it for a turn."""
    import torch

    from espalier.methods.run_config import RunConfig
    from espalier.models.initial import initial_model
    from espalier.tasks.base import base_objective

    settings = RunConfig.from_flat(
        {"model": case.model, "method": "fedavg", "batch-size": case.batch, "local-steps": case.steps}
    )
    data = _images(case)
    dense = initial_model(settings, case.shape, classes=len(data.classes))
    plain = PlainLoop(copy.deepcopy(dense), base_objective(settings), data, settings, torch.device(device))
    networks: dict[str, nn.Module] = {"client": dense}
    if case.model.startswith("unet"):
        from espalier.models.pruning import prune

        networks["pruned"] = prune(dense, RATIO)
        if variants:
            from espalier.models.attention import attend_as_diffusers

            networks[PLAIN_ATTENTION] = copy.deepcopy(dense)
            attend_as_diffusers(networks[PLAIN_ATTENTION])
    if variants:
        other: Any = copy.deepcopy(dense)
        networks[CHANNELS_LAST] = other.to(memory_format=torch.channels_last)
        networks[COMPILED] = cast("nn.Module", torch.compile(copy.deepcopy(dense)))
    clients = {name: Client(network, data, settings, device).turn for name, network in networks.items()}
    return {"loop": plain.turn, **clients}


class Client:
    """Training as a client does it, its state kept from round to round; reading and writing files is left out."""

    def __init__(self, network: nn.Module, data: ImageSet, settings: RunConfig, device: str) -> None:
        self._network, self._data, self._settings, self._device = network, data, settings, device
        self._state: dict[str, Any] = {}

    def turn(self, number: int) -> None:
        """Train one round."""
        from espalier.tasks.base import base_objective
        from espalier.training.objectives import LocalRound
        from espalier_client.trainer import train_local

        local = LocalRound(settings=self._settings, round=number + 1, state=self._state, own_state=True)
        objective = base_objective(self._settings)
        train_local(self._network, objective, self._data, local, seed=number, device=self._device)


class PlainLoop:
    """The loop a person would write for the same loss: data and optimiser stay where they are."""

    def __init__(
        self, network: nn.Module, objective: Any, data: ImageSet, settings: RunConfig, device: torch.device
    ) -> None:
        import numpy as np
        import torch

        from espalier_client.optimizers import RATES

        self._network, self._objective, self._settings = network.to(device).train(), objective, settings
        self._device = device
        self._images = data.fetch(np.arange(len(data))).to(device)
        self._labels = torch.from_numpy(np.asarray(data.labels)).to(device)
        parameters = self._network.parameters()
        self._optimizer: torch.optim.Optimizer
        if settings.model.startswith("unet"):
            self._optimizer = torch.optim.Adam(parameters, lr=RATES["adam"], fused=True)
        else:
            self._optimizer = torch.optim.SGD(parameters, lr=RATES["sgd"])

    def turn(self, number: int) -> None:
        """Train as many steps as a round has."""
        import torch
        from torch import nn

        from espalier.training.objectives import LocalRound

        self._objective.begin(self._network, LocalRound(settings=self._settings, round=number + 1))
        generator = torch.Generator(device=self._device).manual_seed(number)
        order = torch.randperm(len(self._images))
        size = self._settings.batch_size
        mixed = self._device.type == "cuda" and torch.cuda.is_bf16_supported()
        for step in range(self._settings.local_steps):
            chosen = order[step * size : (step + 1) * size].to(self._device)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=mixed):
                loss = self._objective.loss(
                    self._network, self._images[chosen], self._labels[chosen], generator
                )
            loss.backward()
            nn.utils.clip_grad_norm_(self._network.parameters(), self._settings.clip_norm)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)


def _images(case: Case) -> ImageSet:
    """Make up as many images as a turn takes."""
    import numpy as np
    import torch

    from espalier.data.imageset import TensorImages

    draw = np.random.default_rng(0)
    count = case.batch * case.steps
    pixels = torch.from_numpy(draw.integers(0, 256, (count, *case.shape), dtype=np.uint8))
    return TensorImages(pixels, draw.integers(0, 10, count), tuple(str(i) for i in range(10)), "made up")


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def main() -> int:
    """Run as a command."""
    made = parser("train", ABOUT)
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--threads", type=int, default=0, help="threads of torch on a CPU; 0: its own choice")
    made.add_argument("--model", help="only the cases of this network")
    made.add_argument(
        "--variants", action="store_true", help="also channels_last, torch.compile, diffusers' attention"
    )
    arguments = made.parse_args()
    cases = TINY if arguments.tiny else CASES[arguments.device.partition(":")[0]]
    if arguments.model and not (cases := [case for case in cases if case.model == arguments.model]):
        made.error(f"there is no case of {arguments.model}")
    with torch_threads(arguments.threads):
        outcome = measure(cases, arguments.device, variants=arguments.variants)
    return show("train", ABOUT, outcome, arguments)


if __name__ == "__main__":
    sys.exit(main())
