"""Flower's SecAgg+ on our own node and our own Fleet server: the server learns the mean and no single update."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import bytes_to_ndarray, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow

from tests.support.flower_helpers import fleet, online, resident

VALUES = {0: 0.5, 1: -1.0, 2: 3.0}
EXAMPLES = {0: 10, 1: 20, 2: 30}


class Device(NumPyClient):
    """Answers with its own value everywhere."""

    def __init__(self, index: int) -> None:
        self.index = index

    def fit(self, parameters: Any, config: Any) -> tuple[list[np.ndarray], int, dict[str, Any]]:
        """Return the value; client 2 of round 2 breaks down."""
        if self.index == 2 and config["round"] == 2:
            raise RuntimeError("out of power")
        return [np.full((4, 5), VALUES[self.index])], EXAMPLES[self.index], {}


def make(context: Context) -> Any:
    return Device(int(str(context.node_config["index"]))).to_client()


class Watching:
    """A grid that keeps every reply a server sees."""

    def __init__(self, grid: Any) -> None:
        self.grid, self.seen = grid, list[Message]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.grid, name)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = list(self.grid.send_and_receive(messages, timeout=timeout))
        self.seen += replies
        return replies


class Keeping(FedAvg):
    """FedAvg that keeps what it is handed."""

    def __init__(self) -> None:
        super().__init__(
            min_fit_clients=3,
            min_available_clients=3,
            fraction_evaluate=0.0,
            initial_parameters=ndarrays_to_parameters([np.zeros((4, 5))]),
            on_fit_config_fn=lambda round_: {"round": round_},
        )
        self.means: list[np.ndarray] = []

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        self.means.append(parameters_to_ndarrays(results[0][1].parameters)[0])
        return super().aggregate_fit(server_round, results, failures)


def test_the_server_learns_the_weighted_mean_alone(tmp_path: Path) -> None:
    """In round 2 a client is lost between its key and its update; the others' shares take its mask off."""
    app = ClientApp(make, mods=[secaggplus_mod])
    strategy = Keeping()
    with ExitStack() as stack:
        server = stack.enter_context(fleet())
        for index in VALUES:
            stack.enter_context(
                resident(app, tmp_path / str(index), f"127.0.0.1:{server.port}", node_config={"index": index})
            )
        online(server, 3)
        grid = Watching(server.open_run())
        run = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
        context = LegacyContext(run, config=ServerConfig(num_rounds=2), strategy=strategy)
        secure = SecAggPlusWorkflow(num_shares=3, reconstruction_threshold=2, max_weight=100, timeout=60)
        DefaultWorkflow(fit_workflow=secure)(cast(Any, grid), context)
        grid.close()
    means = [
        sum(VALUES[i] * EXAMPLES[i] for i in who) / sum(EXAMPLES[i] for i in who)
        for who in ((0, 1, 2), (0, 1))
    ]
    for found, mean in zip(strategy.means, means, strict=True):
        np.testing.assert_allclose(found, mean, atol=1e-3)
    # No tensor crossed the link, and what was masked tells nothing: a client's own values are all alike.
    assert not [a for m in grid.seen if m.has_content() for r in m.content.array_records.values() for a in r]
    configs = [m.content.config_records[RECORD_KEY_CONFIGS] for m in grid.seen if m.has_content()]
    masked = [
        bytes_to_ndarray(cast(list[bytes], config[Key.MASKED_PARAMETERS])[-1])
        for config in configs
        if Key.MASKED_PARAMETERS in config
    ]
    assert len(masked) == 3 + 2
    assert all(vector.shape == (4, 5) and len(np.unique(vector)) > 15 for vector in masked)
