"""Evaluation after a window: at the cloud, and at the clients on their own test images."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from espalier import lazy
from espalier.data.imageset import to_float
from espalier.errors import DataError
from espalier.methods.base import Deployed, Method, build_model
from espalier.models.presets import task_of
from espalier.wire.sections import Payload
from espalier_proto import espalier_pb2 as pb
from espalier_server.evaluation.evaluator import ClassifierEvaluator, Evaluator
from espalier_server.evaluation.image_grid import image_grid
from espalier_server.records.record import AccuracyEntry, Evaluation
from espalier_server.records.recorder import RunRecorder
from espalier_server.window_aggregator import WindowAggregator
from espalier_server.window_outcome import WindowOutcome

if TYPE_CHECKING:
    import torch
else:
    torch = lazy.load("torch")


class Assessment:
    """Evaluates the networks that a method deploys.

    Parameters
    ----------
    method : Method
        The algorithm.
    strategy : WindowAggregator
        Sends inquiries to the clients.
    evaluator : Evaluator or ClassifierEvaluator
        Evaluates at the cloud.
    recorder : RunRecorder
        Records the results.
    """

    def __init__(
        self,
        method: Method,
        strategy: WindowAggregator,
        evaluator: Evaluator | ClassifierEvaluator,
        recorder: RunRecorder,
    ) -> None:
        self.method, self.strategy = method, strategy
        self.evaluator, self.recorder = evaluator, recorder
        self._networks: list[Deployed] = []
        self._payload: Payload | None = None

    def networks(self) -> list[Deployed]:
        """Return the networks that users would run now; clients receive an inquiry for them once per global state."""
        state = self.strategy.state
        if self._payload is not state.payload:
            self._payload = state.payload
            self._networks = self.method.deployed(state, self.strategy.ask)
        return self._networks

    def measure(self) -> None:
        """Evaluate the networks and record the results; a failed evaluation is recorded as a fault."""
        state, start = self.strategy.state, time.monotonic()
        self.strategy.outcome = WindowOutcome()
        images = self._client_samples()
        try:
            found = self._evaluate(images)
        except DataError as error:
            found = None
            fault = pb.Fault(tier="cloud", node="cloud", kind="evaluation", detail=str(error))
            fault.window, fault.round = state.window, state.round
            self.recorder.faults([fault])
        if found is not None:
            self.recorder.evaluation(found)
        if network := next((n for n in self.networks() if n.at_cloud), None):
            model = build_model(network.architecture, network.weights)
            self.evaluator.grid(model, self.recorder.grid_path(state.window))
        elif images is not None and isinstance(self.evaluator, Evaluator):
            self.evaluator.save_grid(images, self.recorder.grid_path(state.window))
        if (pictures := self.method.pictures(state)) is not None:
            path = self.recorder.grid_path(state.window)
            path.parent.mkdir(parents=True, exist_ok=True)
            image_grid(torch.from_numpy(pictures)).save(path)
        self.recorder.record_inquiries(self.strategy.outcome)
        self.recorder.record_duration("evaluate", time.monotonic() - start)

    def _evaluate(self, images: torch.Tensor | None) -> Evaluation | AccuracyEntry | None:
        state, settings = self.strategy.state, self.method.settings
        networks = self.networks()
        models = {n.label: build_model(n.architecture, n.weights) for n in networks if n.at_cloud}
        if isinstance(self.evaluator, Evaluator):
            if images is not None:
                return self.evaluator.measure_images(images, state.window, state.round)
            return self.evaluator.measure(models, state.window, state.round)
        found = self.evaluator.measure(models, state.window, state.round)
        if (
            settings.eval_clients
            and task_of(settings.model) == "classification"
            and (clients := self._client_accuracies(networks))
        ):
            found = found or AccuracyEntry(window=state.window, round=state.round)
            found = found.model_copy(update={"clients": clients})
        return found

    def _client_accuracies(self, networks: list[Deployed]) -> dict[str, float]:
        """Return each client's accuracy on its own test images."""
        found: dict[str, float] = {}
        for network in networks:
            if not network.at_clients:
                continue
            answers = self.strategy.ask(
                "accuracy", network.architecture, network.payload, network.clients, self._keys()
            )
            for name, answer in answers.items():
                if total := answer.metrics.get("total", 0):
                    found[name] = answer.metrics.get("correct", 0) / total
        return found

    def _keys(self) -> dict[str, str]:
        """Return the key of each client's view, for methods whose clients have models of their own."""
        if not self.method.own_models:
            return {}
        state, members = self.strategy.state, {m.name: m for m in self.strategy.tree.members()}
        return self.method.assign(state, sorted(members), members, max(state.round, 1))

    def _client_samples(self) -> torch.Tensor | None:
        """Return the samples that clients draw with their own networks; float32 [N, C, H, W] in [-1, 1].

        None if the cloud has a network to sample from, or if clients are not evaluated.
        """
        networks = self.networks()
        at_clients = self.method.settings.eval_clients and isinstance(self.evaluator, Evaluator)
        if not at_clients or any(n.at_cloud for n in networks):
            return None
        drawn = []
        for network in networks:
            answers = self.strategy.ask("samples", network.architecture, network.payload, network.clients)
            drawn += [answers[name].arrays["images"] for name in sorted(answers)]
        return to_float(torch.from_numpy(np.concatenate(drawn))) if drawn else None
