"""A resident node that replies like a client, with or without training: ``python -m bench.signing_client``."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from flwr.app import Context, Message

from espalier.flower.node_state import load_key
from espalier.flower.resident import ResidentNode, Upstream
from espalier.wire import control
from espalier.wire.sections import Payload
from espalier.wire.signature import payload_digest, sign, statement_of
from espalier_proto import espalier_pb2 as pb


def answer(message: Message, context: Context) -> Message:
    """Reply with changed weights and no training; signed if the node config names a key."""
    plan = control.decode(pb.RoundPlan, control.plan_bytes(message), "edge")
    report = pb.ClientReport(
        schema=control.SCHEMA,
        run=plan.run,
        window=plan.window,
        round=plan.round,
        client=plan.client,
        samples=1,
    )
    received = control.read_payload(message, control.plan_sections(plan, "edge"), "edge")
    # Values that differ between clients and from those received: Flower does not send objects that a server has.
    own = 1 + context.node_id % 4096 / 4096
    sent = {
        s: {n: a + a.dtype.type(own) for n, a in arrays.items()} for s, arrays in received.views().items()
    }
    payload = Payload.fill(received.layouts, sent).frozen()
    if key := context.node_config.get("key"):
        statement = statement_of(plan, report, payload_digest(payload.to_records()))
        report.signed.CopyFrom(sign(statement, load_key(Path(str(key)))))
    return Message(control.report_content(report, payload, 1, 0.0), reply_to=message)


def train(message: Message, context: Context) -> Message:
    """Reply with Espalier's ClientApp: train on the digits, under the name that the plan uses."""
    from espalier_client.app import app

    name = f"client-{context.node_id}"
    context.node_config = {**context.node_config, "name": name, "data": "digits:0/2", "device": "cpu"}
    return app(message, context)


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("state", type=Path)
    parser.add_argument("address")
    parser.add_argument("--root-certificates", type=Path)
    parser.add_argument("--sign", action="store_true")
    parser.add_argument("--train", action="store_true")
    arguments = parser.parse_args()
    roots = arguments.root_certificates and arguments.root_certificates.read_bytes()
    upstream = Upstream(arguments.address, root_certificates=roots, insecure=roots is None)
    config = {"key": str(arguments.state / "node.key")} if arguments.sign else {}
    if arguments.train:
        import torch

        torch.set_num_threads(1)  # as the clients of `espalier demo` on a machine with two cores
    node = ResidentNode(train if arguments.train else answer, [upstream], arguments.state, node_config=config)
    signal.signal(signal.SIGTERM, lambda *_: node.stop())
    node.run()


if __name__ == "__main__":
    main()
