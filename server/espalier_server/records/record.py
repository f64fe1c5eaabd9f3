"""The record of a run: the schema of report.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field

from espalier.errors import StateError
from espalier.models.presets import Task, is_model, task_of
from espalier.storage.json_file import jsonable, write_json
from espalier.storage.run_folder import REPORT_FILE
from espalier.training.privacy import EPSILON
from espalier.wire.traffic import LINKS


class _Entry(BaseModel):
    # Numbers may be NaN in memory and are null in JSON, so such fields are optional.
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class Participation(_Entry):
    """A client that contributed to a round, the edge it trained at, and whether the cloud checked its signature."""

    client: str
    edge: str
    signed: bool = False


class SignatureEntry(_Entry):
    """Number of valid signatures, as checked by the edges and by the cloud.

    Answers to inquiries count, too. Edges also send inquiries of their own, so their number may be larger. `unsigned`
    lists the clients whose updates or answers were accepted without a signature.
    """

    edges: int = 0
    cloud: int = 0
    unsigned: list[str] = Field(default_factory=list)


class SelectionEntry(_Entry):
    """How a sampler that ranks clients selected the participants of a round.

    `rule` is the sampler's name, `candidates` are the clients that it ranked, `scores` the values that it ranked them
    by (a loss, a gain), and `picked` the clients that it selected.
    """

    rule: str = ""
    candidates: list[str] = Field(default_factory=list)
    scores: dict[str, float | None] = Field(default_factory=dict)
    picked: list[str] = Field(default_factory=list)


class RoundEntry(_Entry):
    """One edge round over all edges.

    `loss` is the sample-weighted mean over the clients that replied, None if none did. `seconds` is the duration at
    the slowest edge. `selection` is None if the sampler does not rank clients.
    """

    round: int
    loss: float | None = None
    participants: list[Participation] = Field(default_factory=list)
    samples: int = 0
    seconds: float = 0.0
    selection: SelectionEntry | None = None


class Traffic(_Entry):
    """Payload bytes on one kind of link, as sent; `up` is towards the cloud."""

    up_bytes: int = 0
    down_bytes: int = 0
    messages: int = 0


def _no_traffic() -> dict[str, Traffic]:
    return {link: Traffic() for link in LINKS}


class WindowEntry(_Entry):
    """One window; mappings are by edge name unless stated otherwise.

    `rho` holds the weights of the edges at the cloud, `mu` their homogeneity scores, `labels` their accumulated label
    counts, `samples` the number of samples trained on, and `timings` seconds by phase. `mu_planned` is the mean score
    of the planned assignment, `mu_random` that of a random assignment of the same clients. `assignments` maps client
    names to a cluster, the level of a sub-model, or a model, e.g. "cluster 1" or "width 0.5".
    """

    window: int
    rounds: list[RoundEntry] = Field(default_factory=list)
    rho: dict[str, float | None] = Field(default_factory=dict)
    mu: dict[str, float | None] = Field(default_factory=dict)
    mu_planned: float | None = None
    mu_random: float | None = None
    samples: dict[str, int] = Field(default_factory=dict)
    labels: dict[str, list[float]] = Field(default_factory=dict)
    links: dict[str, Traffic] = Field(default_factory=_no_traffic)
    timings: dict[str, float] = Field(default_factory=dict)
    metrics: dict[str, float | None] = Field(default_factory=dict)
    assignments: dict[str, str] = Field(default_factory=dict)
    signatures: SignatureEntry = Field(default_factory=SignatureEntry)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def losses(self) -> list[float | None]:
        """Loss of each round, in order."""
        return [entry.loss for entry in self.rounds]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def participants(self) -> list[str]:
        """Names of the participants of the window, sorted."""
        return sorted({p.client for entry in self.rounds for p in entry.participants})


class ModelSize(_Entry):
    """Parameters, and multiply-accumulate operations per image, now and before pruning."""

    params: int = 0
    macs: int = 0
    params_dense: int = 0
    macs_dense: int = 0
    pruned_at_window: int | None = None
    pruned_at_round: int | None = None


class Scores(_Entry):
    """Quality measures of a set of images against the evaluation data."""

    frechet: float | None = None
    inception_score: float | None = None
    kid: float | None = None


class Evaluation(Scores):
    """Quality measures of the samples after a window, and of real images, noise and a Gaussian fit as references."""

    window: int
    round: int
    samples: int = 0
    features: str = ""
    floor: Scores = Field(default_factory=Scores)
    noise: Scores = Field(default_factory=Scores)
    gaussian: Scores = Field(default_factory=Scores)
    seconds: float = 0.0


class ModelScore(_Entry):
    """Accuracy of a classifier on the test split of `eval-data`.

    `accuracy` is a share in [0, 1], `loss` the mean cross-entropy in nats, and `classes` the accuracy within each
    class, None for a class without test images.
    """

    accuracy: float | None = None
    loss: float | None = None
    classes: list[float | None] = Field(default_factory=list)


class AccuracyEntry(_Entry):
    """Accuracies after a window.

    `models` holds the models evaluated at the cloud on `eval-data`, by name ("global", "cluster 0", "width 0.5",
    "exit 2"); `clients` holds each client's accuracy on its own test images, with the model that it uses. Either may be
    empty. `samples` is the number of test images at the cloud.
    """

    window: int
    round: int
    models: dict[str, ModelScore] = Field(default_factory=dict)
    clients: dict[str, float | None] = Field(default_factory=dict)
    samples: int = 0
    seconds: float = 0.0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def mean(self) -> float | None:
        """Unweighted mean of the clients' accuracies; None if there are none."""
        known = self._known()
        return sum(known) / len(known) if known else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def worst10(self) -> float | None:
        """Mean over the worst tenth of the clients, rounded down but at least one (Li et al. 2020, q-FedAvg)."""
        known = self._known()
        worst = known[: max(1, len(known) // 10)]
        return sum(worst) / len(worst) if worst else None

    def _known(self) -> list[float]:
        return sorted(a for a in self.clients.values() if a is not None and not math.isnan(a))


class FaultEntry(_Entry):
    """A fault that the run tolerated; `kind` as in the protobuf message `Fault`."""

    tier: str
    node: str
    kind: str
    detail: str = ""
    window: int = 0
    round: int = 0


class PrivacyEntry(_Entry):
    """The differential privacy that a client has spent in this run, as it reports it; None for mechanisms not used.

    `histogram` is the epsilon of its label counts; `dp_sgd` and `update` are epsilons at the run's ``dp-delta``. The
    first two protect a single image (added or removed), the third all images of the client (replaced).
    """

    histogram: float | None = None
    dp_sgd: float | None = None
    update: float | None = None

    def update_from(self, metrics: Mapping[str, float]) -> None:
        """Update from the metrics of a client report; values never decrease, also when a resumed run repeats rounds."""
        if (spent := metrics.get(EPSILON["dp-sgd"])) is not None:
            self.dp_sgd = max(spent, self.dp_sgd or 0.0)
        if (spent := metrics.get(EPSILON["update"])) is not None:
            self.update = max(spent, self.update or 0.0)


class ClientEntry(_Entry):
    """A client, as described in its hello, and its privacy spending."""

    samples: int = 0
    edges: list[str] = Field(default_factory=list)
    labels: list[float] = Field(default_factory=list)
    data: str = ""
    device: str = ""
    privacy: PrivacyEntry = Field(default_factory=PrivacyEntry)


class AugmentationEntry(_Entry):
    """FAug's augmentation before the first round, by client: seed images, generated images and privacy leakages."""

    seeds: dict[str, int] = Field(default_factory=dict)
    filled: dict[str, int] = Field(default_factory=dict)
    leakage_to_server: dict[str, float] = Field(default_factory=dict)
    leakage_between: dict[str, float] = Field(default_factory=dict)
    parameters: int = Field(default=0, description="parameters of the generator that all clients receive")
    links: dict[str, Traffic] = Field(default_factory=dict)


class RunRecord(_Entry):
    """The content of report.json, from which report.html is rendered."""

    espalier: str = ""
    run: str = ""
    status: Literal["running", "finished", "stopped", "failed"] = "running"
    reason: str = ""
    started: str = Field(default="", description="ISO 8601, UTC")
    seconds: float = 0.0
    method: str = ""
    config: dict[str, bool | int | float | str] = Field(default_factory=dict)
    classes: list[str] = Field(default_factory=list)
    edges: list[str] = Field(default_factory=list)
    clients: dict[str, ClientEntry] = Field(default_factory=dict)
    model: ModelSize = Field(default_factory=ModelSize)
    windows: list[WindowEntry] = Field(default_factory=list)
    quality: list[Evaluation] = Field(default_factory=list)
    accuracy: list[AccuracyEntry] = Field(default_factory=list)
    links: dict[str, Traffic] = Field(default_factory=_no_traffic)
    faults: list[FaultEntry] = Field(default_factory=list)
    augmentation: AugmentationEntry | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def task(self) -> Task:
        """The task of the run's model; diffusion if the record names no known model."""
        model = str(self.config.get("model", ""))
        return task_of(model) if is_model(model) else "diffusion"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fault_counts(self) -> dict[str, dict[str, int]]:
        """Number of faults by tier and kind."""
        counts: dict[str, dict[str, int]] = {}
        for fault in self.faults:
            kinds = counts.setdefault(fault.tier, {})
            kinds[fault.kind] = kinds.get(fault.kind, 0) + 1
        return counts

    def as_dict(self) -> dict[str, Any]:
        """Return the record in JSON types; NaN becomes None."""
        content: dict[str, Any] = jsonable(self.model_dump())
        return content

    def write(self, folder: Path) -> Path:
        """Write ``FOLDER/report.json`` atomically and return its path.

        Raises
        ------
        StateError
            The folder cannot be written to.
        """
        path = folder / REPORT_FILE
        write_json(path, self.as_dict())
        return path

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Read ``FOLDER/report.json``.

        Raises
        ------
        StateError
            The file does not exist, cannot be read or is not a record.
        """
        path = folder / REPORT_FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise StateError(f"{folder} holds no {REPORT_FILE}; give the --out folder of a run") from error
        except OSError as error:
            raise StateError(f"cannot read {path}: {error}; make the file readable for this user") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            location = ".".join(str(step) for step in first["loc"]) or "the file"
            raise StateError(
                f"{path} is not a report ({location}: {first['msg']}); run the run again"
            ) from error
