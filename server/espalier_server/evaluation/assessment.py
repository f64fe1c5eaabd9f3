"""After a window: what its networks are worth, measured at the cloud and by the clients that use them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

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


class Assessment:
    """Measures the networks that a method deploys.

    Parameters
    ----------
    method : Method
        The algorithm.
    strategy : WindowAggregator
        Asks the clients.
    evaluator : Evaluator or ClassifierEvaluator
        Measures at the cloud.
    recorder : RunRecorder
        Takes what is found.
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
        """Return the networks that users would run now; clients are asked for their part once for each model."""
        state = self.strategy.state
        if self._payload is not state.payload:
            self._payload = state.payload
            self._networks = self.method.deployed(state, self.strategy.ask)
        return self._networks

    def measure(self) -> None:
        """Measure, and enter what was found; a measure that fails is a fault and no reason to lose the run."""
        state, start = self.strategy.state, time.monotonic()
        self.strategy.outcome = WindowOutcome()
        images = self._client_samples()
        try:
            found = self._found(images)
        except DataError as error:
            found = None
            fault = pb.Fault(tier="cloud", node="cloud", kind="evaluation", detail=str(error))
            fault.window, fault.round = state.window, state.round
            self.recorder.faults([fault])
        if found is not None:
            self.recorder.evaluation(found)
        if foremost := next((n for n in self.networks() if n.at_cloud), None):
            model = build_model(foremost.architecture, foremost.weights)
            self.evaluator.grid(model, self.recorder.grid_path(state.window))
        elif images is not None and isinstance(self.evaluator, Evaluator):
            self.evaluator.keep(images, self.recorder.grid_path(state.window))
        if (drawn := self.method.pictures(state)) is not None:
            import torch

            path = self.recorder.grid_path(state.window)
            path.parent.mkdir(parents=True, exist_ok=True)
            image_grid(torch.from_numpy(drawn)).save(path)
        self.recorder.record_inquiries(self.strategy.outcome)
        self.recorder.record_duration("evaluate", time.monotonic() - start)

    def _found(self, images: torch.Tensor | None) -> Evaluation | AccuracyEntry | None:
        state, settings = self.strategy.state, self.method.settings
        networks = self.networks()
        models = {n.label: build_model(n.architecture, n.weights) for n in networks if n.at_cloud}
        asks = settings.eval_clients
        if isinstance(self.evaluator, Evaluator):
            if images is not None:
                return self.evaluator.measure_images(images, state.window, state.round)
            return self.evaluator.measure(models, state.window, state.round)
        found = self.evaluator.measure(models, state.window, state.round)
        if asks and task_of(settings.model) == "classification" and (clients := self._at_clients(networks)):
            found = found or AccuracyEntry(window=state.window, round=state.round)
            found = found.model_copy(update={"clients": clients})
        return found

    def _at_clients(self, networks: list[Deployed]) -> dict[str, float]:
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
        """Return each client's view where it is asked about a network of its own."""
        if not self.method.own_models:
            return {}
        state, members = self.strategy.state, {m.name: m for m in self.strategy.tree.members()}
        return self.method.assign(state, sorted(members), members, max(state.round, 1))

    def _client_samples(self) -> torch.Tensor | None:
        """Return what clients draw with their own networks, all together; float32 [N, C, H, W] in [-1, 1].

        None where the cloud has a network to draw with, and where clients are not asked.
        """
        networks = self.networks()
        asks = self.method.settings.eval_clients and isinstance(self.evaluator, Evaluator)
        if not asks or any(n.at_cloud for n in networks):
            return None
        import torch

        from espalier.data.imageset import to_float

        drawn = []
        for network in networks:
            answers = self.strategy.ask("samples", network.architecture, network.payload, network.clients)
            drawn += [answers[name].arrays["images"] for name in sorted(answers)]
        return to_float(torch.from_numpy(np.concatenate(drawn))) if drawn else None
