"""A resident node with the smallest app there is, as a process: `python -m bench.echo_client STATE HOST:PORT`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from flwr.app import Context, Message, MetricRecord, RecordDict

from common.flower.resident import Home, ResidentNode


def echo(message: Message, context: Context) -> Message:
    """Send the arrays back."""
    del context
    content = RecordDict({"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})})
    return Message(content, reply_to=message)


def main() -> None:
    """Serve until SIGTERM."""
    home = Home(sys.argv[2], insecure=True)
    node = ResidentNode(echo, [home], Path(sys.argv[1]), node_config={})
    signal.signal(signal.SIGTERM, lambda *_: node.stop())
    node.run()


if __name__ == "__main__":
    main()
