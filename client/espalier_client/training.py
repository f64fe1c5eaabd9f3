"""Local training on a device: reads a plan and its payload, trains, and returns the update."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from espalier.config.reproducible import is_reproducible
from espalier.config.run_settings import RunSettings
from espalier.errors import ConfigError, WireError
from espalier.flower.arrays import array_from_numpy, numpy_view
from espalier.methods.base import Method
from espalier.methods.registry import METHODS, create_method
from espalier.methods.run_config import RunConfig
from espalier.methods.views import buffers_of
from espalier.models.architecture import describe
from espalier.models.arrays import model_arrays, to_tensor
from espalier.models.initial import initial_model
from espalier.models.model_cache import release
from espalier.names import NAME_RULE, is_name
from espalier.seeds import rng_for, seed_for
from espalier.tasks.base import base_objective, dataset_loss
from espalier.training.determinism import deterministic
from espalier.training.objectives import LocalResult, LocalRound, Objective
from espalier.training.privacy import PrivacySettings
from espalier.wire import control
from espalier.wire.codec import Codec
from espalier.wire.codec_registry import create_codec
from espalier.wire.downlink import read_downlink
from espalier.wire.sections import MODEL, Layouts, Payload, Sections
from espalier.wire.uplink import UplinkEncoding
from espalier_client.device import Device
from espalier_client.dp_sgd import train_private
from espalier_client.privacy_accounting import Mechanism
from espalier_client.reply import new_report, pack_reply
from espalier_client.round_privacy import RoundPrivacy, check_plan
from espalier_client.trainer import train_local
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from torch import nn

#: Record of `Context.state` that holds a client's state in the run of a stock Flower ServerApp.
STATE = "espalier.state"


@dataclass
class Task:
    """A validated plan with its payload and network.

    Attributes
    ----------
    plan : pb.RoundPlan
        The plan.
    method : Method
        The run's method.
    received : Payload
        The payload.
    local : LocalRound
        The inputs of the training or inquiry; `local.state` is the device's own state.
    model : nn.Module
        The network, with the tensors that it starts from.
    """

    plan: pb.RoundPlan
    method: Method
    received: Payload
    local: LocalRound
    model: nn.Module


def read_task(device: Device, plan: pb.RoundPlan, message: Message) -> Task:
    """Validate a plan and its payload, and build the network.

    Raises
    ------
    WireError
        If the plan is for another client, or its settings, architecture or payload are invalid.
    """
    check_address(device, plan)
    settings = settings_of(plan)
    check_plan(device, plan, settings)
    received = read_downlink(message, plan, settings, plan.edge)
    sent = received.layouts.get(MODEL)
    known = {*(sent.names if sent else ()), *(t.name for t in plan.architecture.tensors)}
    if unknown := set(plan.returns) - known:  # checked before any training and before any privacy is spent
        raise WireError(plan.edge, f"a plan that returns the tensor {min(unknown)!r}, which was not sent")
    state = device.load_state(plan.run, plan.start, exact=settings.reproducible)
    local = local_round(device, settings, plan.round, received.views(), state)
    local.data = device.images_for(plan.run)
    local.architecture, local.population = plan.architecture, plan.population
    local.peers = dict(plan.peers)
    method = create_method(settings)
    try:
        model = method.network(local, plan.architecture)
    except (ValueError, RuntimeError, KeyError) as error:
        raise WireError(plan.edge, f"an architecture that cannot be built ({error})") from error
    return Task(plan, method, received, local, model)


def check_address(device: Device, plan: pb.RoundPlan) -> None:
    """Check that a plan is for this client and that its run id, which names files, is a valid name.

    Raises
    ------
    WireError
        If not.
    """
    if plan.client != device.name:
        raise WireError(plan.edge, f"a plan for client {plan.client!r}, this is {device.name!r}")
    if not is_name(plan.run):
        raise WireError(plan.edge, f"a plan of run {plan.run[:64]!r}; a name is {NAME_RULE}")


def settings_of(plan: pb.RoundPlan) -> RunConfig:
    """Return a plan's settings; raises WireError if this client rejects them."""
    try:
        return RunConfig.from_struct(plan.settings)
    except ConfigError as error:
        raise WireError(plan.edge, f"settings that this client rejects ({error})") from error


def train_round(device: Device, plan: pb.RoundPlan, message: Message) -> RecordDict:
    """Train one round of a plan.

    Parameters
    ----------
    device : Device
        This device.
    plan : pb.RoundPlan
        The round's plan.
    message : Message
        The message that carried the plan and its payload.

    Returns
    -------
    RecordDict
        The update and the ClientReport.

    Raises
    ------
    WireError
        If the plan is for another client, or its settings, architecture or payload are invalid.
    """
    with arithmetic(device, plan):
        return _train_round(device, read_task(device, plan, message))


@contextlib.contextmanager
def arithmetic(device: Device, plan: pb.RoundPlan) -> Iterator[None]:
    """Compute deterministically in a reproducible run: with one thread and on the CPU only.

    Raises
    ------
    WireError
        If a reproducible run calls a client that trains on another device.
    """
    wanted = is_reproducible(plan.settings)
    if wanted and device.torch_device.type != "cpu":
        raise WireError(
            plan.edge,
            f"a reproducible run, and this client trains on {device.torch_device}; start it with --device cpu",
        )
    with deterministic(wanted):
        yield


def _train_round(device: Device, task: Task) -> RecordDict:
    plan, method, local, received = task.plan, task.method, task.local, task.received.views()
    privacy = RoundPrivacy(device, plan, local.settings, len(method.data(local)))
    privacy.spend()
    objective, result = train(device, method, task.model, local, privacy.training)
    arrays = {**method.publish(model_arrays(task.model), local), **objective.extra()}
    report = new_report(device, plan)
    report.steps, report.loss = result.steps, result.loss
    report.seconds, report.cpu_seconds = result.seconds, result.cpu_seconds
    report.metrics.update(result.metrics | local.metrics | {"lr-sum": result.lr_sum})
    method.describe_reply(objective, task.model, report)
    encoding = uplink_encoding(method, plan, task.received.layouts, report)
    arrays = privacy.noised(arrays, received, encoding.keys, buffers_of(plan.architecture))
    rng = rng_for(local.settings.seed, device.name, plan.round, "codec")
    payload, decoded = encoding.encode(arrays, received, rng)
    report.metrics.update(objective.end(task.model, result, as_read(task.model, decoded, received)))
    privacy.describe(report)
    device.save_state(plan, local.state)
    if privacy.training is None:  # DP-SGD wraps the layers
        release(task.model)
    return pack_reply(device, plan, report, payload)


def uplink_encoding(
    method: Method, plan: pb.RoundPlan, received: Layouts, report: pb.ClientReport
) -> UplinkEncoding:
    """Return how the reply to a plan is encoded on the link."""
    names = tuple(plan.returns) or tuple(t.name for t in plan.architecture.tensors)
    codec_name = method.chosen(method.settings, "codec")
    codec: Codec | None = None if codec_name == "none" else create_codec(method.settings, codec_name)
    returned = method.reply_layouts(plan.architecture, received, names, report)
    return UplinkEncoding(returned, received, buffers_of(plan.architecture), codec)


def as_read(model: nn.Module, decoded: Sections, received: Sections) -> dict[str, torch.Tensor]:
    """Return the network's tensors as the servers decode them.

    A tensor in the reply is the decoded one, in whichever section it was sent (the model's or a cluster's); a tensor
    that was not sent is the trained one.
    """
    coded = [decoded[section] for section in sorted(decoded, key=lambda s: s != MODEL) if section in received]
    tensors = {}
    for name, tensor in model.state_dict().items():
        array = next((arrays[name] for arrays in coded if name in arrays), None)
        tensors[name] = tensor.detach().cpu() if array is None else to_tensor(array)
    return tensors


def train_plain(
    device: Device, record: ArrayRecord, round_: int, run_config: Mapping[str, Any], context_state: RecordDict
) -> tuple[ArrayRecord, MetricRecord]:
    """Train one round for a stock Flower ServerApp: named tensors in and out, settings from the run config.

    With the same settings, client names and rounds the result equals that of a round plan. The client's state between
    rounds is in Flower's `Context.state` (`context_state`), because such a run has no versions.
    """
    settings, model = _plain_model(device, record, run_config)
    if settings.of(PrivacySettings).private or device.privacy_budget:
        raise ConfigError(
            "differential privacy needs an Espalier run, whose plans account for the privacy spent; submit one, or "
            "add DP-SGD and update noise to your own ClientApp"
        )
    stored = context_state.get(STATE)
    arrays = stored if isinstance(stored, ArrayRecord) else ArrayRecord()
    state = {name: np.array(numpy_view(array)) for name, array in arrays.items()}
    method = create_method(settings)
    local = local_round(device, settings, round_, {MODEL: model_arrays(model)}, state)
    local.architecture = describe(model)
    objective, result = train(device, method, model, local)
    objective.end(model, result, {n: t.detach().cpu() for n, t in model.state_dict().items()})
    context_state[STATE] = ArrayRecord(
        {name: array_from_numpy(np.asarray(value)) for name, value in state.items()}
    )
    trained = ArrayRecord({n: array_from_numpy(a) for n, a in model_arrays(model).items()})
    return trained, MetricRecord({control.NUM_EXAMPLES: result.samples, "loss": result.loss})


def evaluate_plain(
    device: Device, record: ArrayRecord, round_: int, run_config: Mapping[str, Any]
) -> MetricRecord:
    """Return the mean training objective of a stock ServerApp's model over this device's images."""
    settings, model = _plain_model(device, record, run_config)
    objective = base_objective(settings)
    objective.begin(model, local_round(device, settings, round_, {}, {}))
    generator = torch.Generator(device=device.torch_device)
    generator.manual_seed(seed_for(settings.seed, device.name, round_, "evaluate"))
    model.to(device.torch_device)
    loss = dataset_loss(model, objective, device.images, device.torch_device, settings.batch_size, generator)
    return MetricRecord({control.NUM_EXAMPLES: len(device.images), "loss": loss})


def train(
    device: Device, method: Method, model: nn.Module, local: LocalRound, private: Mechanism | None = None
) -> tuple[Objective, LocalResult]:
    """Train a model in place; all randomness derives from (run seed, client name, round, purpose).

    With DP-SGD it derives from a secret of the device instead, as servers know the run's seed and could compute the
    noise.
    """
    objective = method.objective_for(local)
    if private is not None:
        seed = device.private_seed(local.round, "train")
        data = method.data(local)
        result = train_private(model, objective, data, local, private, seed=seed, device=device.torch_device)
        return objective, result
    result = train_local(
        model,
        objective,
        method.data(local),
        local,
        seed=seed_for(local.settings.seed, device.name, local.round, "train"),
        device=device.torch_device,
    )
    return objective, result


def local_round(
    device: Device,
    settings: RunSettings,
    round_: int,
    received: Sections,
    state: dict[str, np.ndarray],
) -> LocalRound:
    """Return the inputs of a training or an inquiry; the arrays of `state` are modified in place."""
    return LocalRound(
        settings=settings,
        round=round_,
        name=device.name,
        received={n: to_tensor(a) for n, a in received.get(MODEL, {}).items()},
        sections={section: arrays for section, arrays in received.items() if section != MODEL},
        state=state,
        labels=device.labels,
        data=device.images,
        place=str(device.torch_device),
        optimizer=METHODS[settings.method].own_optimizer if settings.optimizer == "auto" else "",
        own_state=True,
    )


def _plain_model(
    device: Device, record: ArrayRecord, run_config: Mapping[str, Any]
) -> tuple[RunConfig, nn.Module]:
    settings = RunConfig.from_flat(run_config)
    model = initial_model(settings, device.images.shape, classes=len(device.images.classes))
    try:
        tensors = {name: to_tensor(numpy_view(array)) for name, array in record.items()}
    except (ValueError, TypeError) as error:  # not an array, or a dtype that torch lacks
        raise WireError("server", f"tensors that cannot be read ({error})") from error
    # A strategy such as FedAdam computes in float64; the model keeps its own dtypes.
    own = model.state_dict()
    try:
        model.load_state_dict({n: t.to(own[n].dtype) if n in own else t for n, t in tensors.items()})
    except RuntimeError as error:
        raise WireError("server", f"tensors that do not fit model={settings.model} ({error})") from error
    return settings, model
