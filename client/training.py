"""Local training on a device: from a plan and a payload to an update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from client.device import Device
from common.errors import ConfigError, WireError
from common.flower.arrays import array_from_numpy, numpy_view, payload_bytes
from common.learning.objectives import LocalResult, LocalRound
from common.learning.trainer import train_local
from common.methods.registry import create_method
from common.models.architecture import build_with
from common.models.initial import initial_model
from common.run.config import RunConfig
from common.seeds import seed_for
from common.wire import control
from common.wire.payload import Weights
from proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from torch import nn


#: Record of `Context.state` that holds a client's own state in a plain run.
STATE = "espalier.state"


def train_round(device: Device, plan: pb.RoundPlan, message: Message) -> RecordDict:
    """Train one round of a plan.

    Parameters
    ----------
    device : Device
        This device.
    plan : pb.RoundPlan
        What to do.
    message : Message
        The message it came in, with the payload.

    Returns
    -------
    RecordDict
        The update and the ClientReport.

    Raises
    ------
    WireError
        If the plan is another client's, or its settings, architecture or payload do not fit.
    """
    if plan.client != device.name:
        raise WireError(plan.edge, f"a plan for client {plan.client!r}, this is {device.name!r}")
    try:
        settings = RunConfig.from_struct(plan.settings)
    except ConfigError as error:
        raise WireError(plan.edge, f"settings this client does not take ({error})") from error
    layout = control.plan_layout(plan, plan.edge)
    received = control.read_weights(message, layout, plan.edge)
    try:
        model = build_with(plan.architecture, _tensors(received.views()))
    except (ValueError, RuntimeError) as error:
        raise WireError(plan.edge, f"an architecture that cannot be built ({error})") from error

    state = device.load_state(plan.run, plan.start)
    result = _train(device, model, settings, plan.round, state)
    device.save_state(plan, state)

    arrays = Weights.fill(layout, _arrays(model)).to_record()
    report = pb.ClientReport(
        schema=control.SCHEMA,
        run=plan.run,
        window=plan.window,
        round=plan.round,
        client=device.name,
        samples=result.samples,
        steps=result.steps,
        loss=result.loss,
        seconds=result.seconds,
    )
    content = control.report_content(report, arrays, result.samples, result.loss)
    report.up_bytes = payload_bytes(content)
    return control.report_content(report, arrays, result.samples, result.loss)


def train_plain(
    device: Device, record: ArrayRecord, round_: int, run_config: Mapping[str, Any], kept: RecordDict
) -> tuple[ArrayRecord, MetricRecord]:
    """Train one round for a plain Flower ServerApp: named tensors in and out, settings from the run config.

    With the same settings, client names and rounds this is exactly what a plan of the tree trains. What
    the client keeps between rounds is in Flower's `Context.state`, because a plain run has no versions.
    """
    settings, model = _plain_model(device, record, run_config)
    before = kept.get(STATE)
    arrays = before if isinstance(before, ArrayRecord) else ArrayRecord()
    state = {name: np.array(numpy_view(array)) for name, array in arrays.items()}
    result = _train(device, model, settings, round_, state)
    kept[STATE] = ArrayRecord({name: array_from_numpy(np.asarray(value)) for name, value in state.items()})
    trained = ArrayRecord({n: array_from_numpy(a) for n, a in _arrays(model).items()})
    return trained, MetricRecord({control.NUM_EXAMPLES: result.samples, "loss": result.loss})


def evaluate_plain(
    device: Device, record: ArrayRecord, round_: int, run_config: Mapping[str, Any]
) -> MetricRecord:
    """Return the mean training objective of a plain Flower model over this device's images."""
    settings, model = _plain_model(device, record, run_config)
    model.to(device.torch_device).eval()
    objective = create_method(settings).objective(round_)
    objective.begin(model, LocalRound(settings, round_, {}, {}, {}))
    generator = torch.Generator(device=device.torch_device)
    generator.manual_seed(seed_for(settings.seed, device.name, round_, "evaluate"))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(device.images), settings.batch_size):
            indices = np.arange(start, min(start + settings.batch_size, len(device.images)))
            images = device.images.fetch(indices).to(device.torch_device)
            labels = torch.from_numpy(device.images.labels[indices]).to(device.torch_device)
            total += float(objective.loss(model, images, labels, generator)) * len(indices)
    return MetricRecord({control.NUM_EXAMPLES: len(device.images), "loss": total / len(device.images)})


def _train(
    device: Device, model: nn.Module, settings: RunConfig, round_: int, state: dict[str, np.ndarray]
) -> LocalResult:
    """Train a model in place; every random number hangs on (run seed, client name, round, purpose)."""
    local = LocalRound(
        settings=settings,
        round=round_,
        received={n: p.detach().clone() for n, p in model.state_dict().items()},
        aux={},
        state=state,
    )
    return train_local(
        model,
        create_method(settings).objective(round_),
        device.images,
        local,
        seed=seed_for(settings.seed, device.name, round_, "train"),
        device=device.torch_device,
    )


def _plain_model(
    device: Device, record: ArrayRecord, run_config: Mapping[str, Any]
) -> tuple[RunConfig, nn.Module]:
    settings = RunConfig.from_flat(run_config)
    model = initial_model(settings, device.images.shape)
    tensors = _tensors({name: numpy_view(array) for name, array in record.items()})
    # A strategy such as FedAdam computes in float64; the model keeps its own dtypes.
    own = model.state_dict()
    try:
        model.load_state_dict({n: t.to(own[n].dtype) if n in own else t for n, t in tensors.items()})
    except RuntimeError as error:
        raise WireError("server", f"tensors that do not fit model={settings.model} ({error})") from error
    return settings, model


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    # A received buffer is read-only and training changes tensors in place: this is the one copy.
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def _arrays(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
