"""The settings of every run: method and model, rounds, local training, evaluation, time limits, the run's folder."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from espalier.config.fields import (
    Count,
    NonNegative,
    Positive,
    PositiveInt,
    SettingsGroup,
    setting_error,
)
from espalier.names import NAME_RULE, is_name

_DEVICE = r"^(auto|cpu|mps|cuda(:\d+)?)$"


class CoreSettings(SettingsGroup):
    """The settings of every run.

    Times are in seconds. `warmup_steps` and `local_steps` count optimiser steps, `rounds` edge rounds.
    """

    cloud_only: ClassVar[frozenset[str]] = frozenset({"out", "eval_data"})

    method: str = Field(default="fedphd", description="federated method, by its name in docs/methods.md")
    model: str = Field(
        default="unet-tiny", min_length=1, description="model preset; it determines the task of the run"
    )
    seed: Count = Field(default=2023, description="seed that all randomness of the run derives from")
    reproducible: bool = Field(
        default=False,
        description="bit-identical results, also after failures and resumes: CPU, one thread, ordered sums",
    )

    rounds: PositiveInt = Field(default=60, description="edge rounds in total")
    rg: PositiveInt = Field(
        default=5, description="edge rounds per window, i.e. between two cloud aggregations"
    )
    fraction: float = Field(default=1.0, gt=0, le=1, description="share of the clients that train in a round")
    min_edges: PositiveInt = Field(default=1, description="edges that must have joined before the run starts")
    min_clients: PositiveInt = Field(
        default=1, description="clients that must have joined before the run starts"
    )

    local_epochs: PositiveInt = Field(default=1, description="epochs a client trains per round")
    batch_size: PositiveInt = Field(default=32, description="images per optimiser step")
    local_steps: Count = Field(
        default=0, description="optimiser steps a client takes per round; 0: local-epochs epochs"
    )
    optimizer: Literal["auto", "adam", "sgd"] = Field(
        default="auto", description="clients' optimiser; auto: Adam for diffusion, SGD for classifiers"
    )
    learning_rate: NonNegative = Field(
        default=0.0, description="step size after warm-up; 0: 0.001 with Adam, 0.05 with SGD"
    )
    learning_rate_decay: float = Field(
        default=1.0, gt=0, le=1, description="factor on the step size after each round"
    )
    momentum: float = Field(default=0.0, ge=0, lt=1, description="momentum of SGD, reset in every round")
    weight_decay: NonNegative = Field(default=0.0, description="L2 penalty in the optimiser")
    warmup_steps: Count = Field(
        default=100, description="optimiser steps of Adam over which the step size rises linearly"
    )
    clip_norm: NonNegative = Field(default=1.0, description="largest gradient norm; 0: no clipping")
    flip: bool = Field(default=False, description="mirror training images at random")
    keep_optimizer: bool = Field(
        default=True, description="clients store Adam's moments from one round to the next"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(default="auto", description="arithmetic of training")
    ema_decay: float = Field(
        default=0.0, ge=0, lt=1, description="decay of the model's moving average at the cloud; 0: none"
    )
    device: str = Field(default="auto", pattern=_DEVICE, description="device of the cloud's computations")

    eval_data: str = Field(
        default="", description="data that the cloud evaluates against; empty: no evaluation"
    )
    eval_clients: bool = Field(
        default=False, description="clients also evaluate classifiers on their own test images"
    )
    eval_every: PositiveInt = Field(default=1, description="windows between two evaluations")

    round_deadline: Positive = Field(
        default=600.0, description="seconds an edge waits for its clients' replies"
    )
    adaptive_deadline: bool = Field(
        default=True,
        description="an edge waits three times as long as it expects its slowest client to take, at least 10 s "
        "and at most round-deadline",
    )
    window_deadline: NonNegative = Field(
        default=0.0, description="seconds the cloud waits for its edges; 0: rg round deadlines and a margin"
    )
    quorum: PositiveInt = Field(default=1, description="replies an edge needs for a round to count")
    hello_timeout: Positive = Field(
        default=120.0, description="seconds the cloud waits for edges and clients to join"
    )
    require_signatures: bool = Field(
        default=True, description="refuse clients' updates that are not signed with their node keys"
    )
    keep_checkpoints: PositiveInt = Field(
        default=3, description="number of newest checkpoints on disk, in addition to the best one"
    )

    out: str = Field(default="", description="folder of the run on the cloud's machine")
    run_id: str = Field(
        default="", description="Espalier's name of the run, unchanged by a resume; empty: a new one"
    )

    @field_validator("run_id")
    @classmethod
    def _check_run_id(cls, value: str) -> str:
        if value and not is_name(value):
            raise setting_error(f'"{value}" is not a valid name; use {NAME_RULE}')
        return value

    @property
    def windows(self) -> int:
        """Number of windows, `rounds` / `rg` rounded up; the last one may be shorter."""
        return math.ceil(self.rounds / self.rg)

    @property
    def cloud_device(self) -> str:
        """Device of the cloud's computations: the CPU in a reproducible run, otherwise `device`."""
        return "cpu" if self.reproducible else self.device
