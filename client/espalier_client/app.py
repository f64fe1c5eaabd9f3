"""The ClientApp of `espalier client` and of a stock flower-supernode."""

from __future__ import annotations

import logging
import time

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from espalier.errors import WireError
from espalier.monitor.logs import bind
from espalier.wire import control
from espalier_client.device import Device
from espalier_client.inquiry import answer
from espalier_client.training import evaluate_plain, train_plain, train_round
from espalier_proto import espalier_pb2 as pb

log = logging.getLogger("espalier.client")

#: Maximum number of characters of a refusal that are logged.
MAX_FAULT_LENGTH = 500

app = ClientApp()


@app.query("espalier_hello")
def hello(message: Message, context: Context) -> Message:
    """Return this device's hello to an edge."""
    device = Device.from_node_config(context.node_config)
    request = control.config_of(message, control.CONFIG) or ConfigRecord()
    epsilon = request.get("histogram-epsilon", 0.0)
    if not isinstance(epsilon, int | float) or not 0 <= epsilon < float("inf"):
        raise WireError("edge", f"a hello with histogram-epsilon {epsilon!r}")
    answer = device.hello(str(request.get("run", "")), float(epsilon))
    return Message(control.control_content(answer), reply_to=message)


@app.query("espalier_refusal")
def refused(message: Message, context: Context) -> Message:
    """Log that the cloud excludes this device from a run, and why."""
    request = control.config_of(message, control.CONFIG) or ConfigRecord()
    run, fault = (
        "".join(c if c.isprintable() else "?" for c in str(request.get(key, "")))[:MAX_FAULT_LENGTH]
        for key in ("run", "fault")
    )
    log.error("left out of run %s: %s", run, fault)
    return Message(RecordDict(), reply_to=message)


@app.query("espalier_inquiry")
def inquire(message: Message, context: Context) -> Message:
    """Answer an edge's inquiry."""
    device = Device.from_node_config(context.node_config)
    plan = control.decode(pb.RoundPlan, control.plan_bytes(message), "edge")
    return Message(answer(device, plan, message), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round as an edge's plan says, or for a stock Flower ServerApp as the run config says."""
    device = Device.from_node_config(context.node_config)
    data = control.plan_bytes(message)
    if data is not None:
        plan = control.decode(pb.RoundPlan, data, "edge")
        with bind(run=plan.run, window=plan.window, round=plan.round, client=device.name):
            start = time.monotonic()
            content = train_round(device, plan, message)
            log.info("round %d: trained %.1f s", plan.round, time.monotonic() - start)
        return Message(content, reply_to=message)
    arrays, metrics = train_plain(device, *_plain(message), context.run_config, context.state)
    return Message(RecordDict({control.ARRAYS: arrays, control.METRICS: metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Return the training loss of a stock Flower ServerApp's model on this device's images."""
    device = Device.from_node_config(context.node_config)
    metrics: MetricRecord = evaluate_plain(device, *_plain(message), context.run_config)
    return Message(RecordDict({control.METRICS: metrics}), reply_to=message)


def _plain(message: Message) -> tuple[ArrayRecord, int]:
    """Return the arrays and the round of a message of a stock strategy."""
    arrays = [record for record in message.content.values() if isinstance(record, ArrayRecord)]
    if len(arrays) != 1:
        raise WireError("server", f"{len(arrays)} array records, expected one")
    config = control.config_of(message, control.CONFIG) or ConfigRecord()
    round_ = config.get("server-round", 0)
    return arrays[0], round_ if isinstance(round_, int) else 0
