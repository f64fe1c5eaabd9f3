"""Images per second of a client's local training, against a plain PyTorch loop; pruned against dense networks.

All contestants train the same network on as many images with the same optimiser, alternately in one process, in an
order that is reversed from turn to turn. A ratio is the median over turns of the ratio within a turn, so that load
that lasts longer than a turn affects both. ``python -m bench.train``.

With ``--variants`` the client also trains the network in channels_last memory format, compiled with torch.compile,
and (U-Nets) with diffusers' own attention; the table then shows the speed-up of each, and after how many steps the
time for compilation is regained.
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

ABOUT = "Images per second of a client's local training, against a plain PyTorch loop, dense and pruned"
RATIO = 0.2
_VARIANTS = (CHANNELS_LAST, COMPILED, PLAIN_ATTENTION) = ("channels_last", "compiled", "diffusers_attention")


@dataclass(frozen=True)
class Case:
    """A network to train, the number of starts (fresh copies of all contestants), and of turns and steps per start.

    The placement of a network in memory makes it up to a tenth faster or slower than its copy, so a case has several
    starts. With an even number of turns, both orders occur equally often. `threads` is torch's number of threads; 0
    leaves its default.
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
        # The demonstration's four clients have one thread each on machines of up to seven cores.
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
    """Wall and processor seconds of every turn by contestant, and the seconds of a compiled network's first turn."""

    wall: Mapping[str, Sequence[float]]
    processor: Mapping[str, Sequence[float]]
    first: float | None = None


def measure(cases: Sequence[Case], device: str, *, variants: bool = False) -> Outcome:
    """Train every case on a device: client and plain loop, dense and (U-Nets) pruned, and `variants` if True."""
    outcome = Outcome()
    for case in cases:
        with torch_threads(case.threads):
            seconds = _seconds(case, device, variants)
        wall = seconds.wall
        rates = {n: case.batch * case.steps / statistics.median(turns) for n, turns in wall.items()}
        loop = over(wall["client"], wall["loop"])
        row: dict[str, Any] = {
            "network": case.label,
            "device": device,
            "client_images_s": rates["client"],
            "loop_images_s": rates["loop"],
            "client_over_loop": loop,
            "same_by_cpu_s": over(seconds.processor["client"], seconds.processor["loop"]),
        }
        outcome.targets.append(Target.at_least(f"{case.label}: client over plain loop", loop, 0.97))
        if "pruned" in wall:
            pruned = over(wall["pruned"], wall["client"])
            row |= {"pruned_images_s": rates["pruned"], "pruned_over_dense": pruned}
            outcome.targets.append(
                Target.at_least(f"{case.label}: pruned at {RATIO} over dense", pruned, 1.4)
            )
        row |= {f"{name}_over_client": over(wall[name], wall["client"]) for name in wall if name in _VARIANTS}
        if seconds.first is not None:
            row |= compiling(case, seconds)
        outcome.rows.append(row)
    outcome.notes.append(
        "contestants take turns, in an order that is reversed from turn to turn; ratios are medians over turns of the "
        "ratio within a turn; pruned_over_dense: both trained by our client"
    )
    return outcome


def compiling(case: Case, seconds: Seconds) -> dict[str, float | None]:
    """Return the seconds of compilation, and the steps after which they are regained (None: never)."""
    usual, compiled = (statistics.median(seconds.wall[name]) for name in ("client", COMPILED))
    compilation, saved = (seconds.first or 0.0) - compiled, (usual - compiled) / case.steps

    return {"compile_s": compilation, "compile_pays_after_steps": compilation / saved if saved > 0 else None}


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set torch's number of threads (0: unchanged) and restore it on exit."""
    import torch

    own = torch.get_num_threads()
    torch.set_num_threads(count or own)
    try:
        yield
    finally:
        torch.set_num_threads(own)


def over(seconds: Sequence[float], others: Sequence[float]) -> float:
    """Return the speed-up of one contestant over another: the median over turns of the ratio of their seconds."""
    return statistics.median(other / own for own, other in zip(seconds, others, strict=True))


def take_turns(
    turns: Mapping[str, Callable[[int], None]], count: int, ready: Callable[[], None] = lambda: None
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Let all contestants take `count` turns each, in an order that is reversed from turn to turn.

    Parameters
    ----------
    turns : mapping of str to callable
        Each contestant's turn; the argument is the turn's index.
    count : int
        Number of turns that are measured, after one that warms up.
    ready : callable
        Waits until pending work on the device is done.

    Returns
    -------
    tuple of dict of str to list of float
        Wall and processor seconds of every contestant's turns.
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
    """Measure all contestants of a case over all starts."""
    wall: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    first = None
    for _ in range(1 if variants else case.starts):
        turns = contestants(case, device, variants)
        if variants:
            began = time.perf_counter()
            turns[COMPILED](0)
            first = time.perf_counter() - began
        for total, measured in zip(
            (wall, processor), take_turns(turns, case.turns, lambda: _wait(device)), strict=True
        ):
            for name, seconds in measured.items():
                total.setdefault(name, []).extend(seconds)
    return Seconds(wall, processor, first)


def contestants(case: Case, device: str, variants: bool) -> dict[str, Callable[[int], None]]:
    """Build every contestant's network; return functions that train it for a turn, by name."""
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
    """A client's local training, with its state carried from round to round, but no state files."""

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
    """A plain PyTorch loop for the same loss, with data and optimiser persistent on the device."""

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
        """Train the steps of one round."""
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
    """Return random images, as many as a turn uses."""
    import numpy as np
    import torch

    from espalier.data.imageset import TensorImages

    draw = np.random.default_rng(0)
    count = case.batch * case.steps
    pixels = torch.from_numpy(draw.integers(0, 256, (count, *case.shape), dtype=np.uint8))
    return TensorImages(pixels, draw.integers(0, 10, count), tuple(str(i) for i in range(10)), "random")


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def main() -> int:
    """Run the command."""
    options = parser("train", ABOUT)
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    options.add_argument("--threads", type=int, default=0, help="torch's threads on a CPU; 0: its default")
    options.add_argument("--model", help="run only the cases of this network")
    options.add_argument(
        "--variants",
        action="store_true",
        help="also measure channels_last, torch.compile and diffusers' attention",
    )
    arguments = options.parse_args()
    cases = TINY if arguments.tiny else CASES[arguments.device.partition(":")[0]]
    if arguments.model and not (cases := [case for case in cases if case.model == arguments.model]):
        options.error(f"there is no case of {arguments.model}")
    with torch_threads(arguments.threads):
        outcome = measure(cases, arguments.device, variants=arguments.variants)
    return show("train", ABOUT, outcome, arguments)


if __name__ == "__main__":
    sys.exit(main())
