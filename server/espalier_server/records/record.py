"""What a run leaves behind in numbers: the content of report.json."""

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


class _Part(BaseModel):
    # Numbers may be NaN inside the program; JSON has null for them, so such fields are optional.
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class Participation(_Part):
    """A client that contributed to a round, the edge it trained at, and whether the cloud checked its signature."""

    client: str
    edge: str
    signed: bool = False


class SignatureEntry(_Part):
    """Signatures that were found good: those that the edges checked, and those that the cloud checked itself.

    Answers to inquiries are counted, too; an edge also asks for itself, so it may have more. `unsigned` are the
    clients of updates and answers that were let in without.
    """

    edges: int = 0
    cloud: int = 0
    unsigned: list[str] = Field(default_factory=list)


class SelectionEntry(_Part):
    """What a round's choice of clients went by.

    `rule` is its name, `candidates` are the clients that were asked, `scores` what they told or were rated (a
    loss, a gain) and `picked` those that were to train.
    """

    rule: str = ""
    candidates: list[str] = Field(default_factory=list)
    scores: dict[str, float | None] = Field(default_factory=dict)
    picked: list[str] = Field(default_factory=list)


class RoundEntry(_Part):
    """One edge round over all edges.

    `loss` is the sample-weighted mean over the clients that replied, None when none did; `seconds` is the
    slowest edge's. `selection` is None where no more than the plan's draw was at work.
    """

    round: int
    loss: float | None = None
    participants: list[Participation] = Field(default_factory=list)
    samples: int = 0
    seconds: float = 0.0
    selection: SelectionEntry | None = None


class Traffic(_Part):
    """Payload bytes on one kind of link, as sent; `up` is towards the cloud."""

    up_bytes: int = 0
    down_bytes: int = 0
    messages: int = 0


def _no_traffic() -> dict[str, Traffic]:
    return {link: Traffic() for link in LINKS}


class WindowEntry(_Part):
    """One window; the mappings are by edge name.

    `rho` are the cloud's weights, `mu` the edges' homogeneity scores, `labels` the accumulated label counts,
    `samples` what the edges trained on, `timings` seconds by what they went into. `mu_planned` is the mean
    score the edge choice planned, `mu_random` what a random assignment of the same clients reaches.
    `assignments` is by client name: its cluster or the level of its sub-model, e.g. "cluster 1", "width 0.5".
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
        """Names of the clients that took part in the window."""
        return sorted({part.client for entry in self.rounds for part in entry.participants})


class ModelSize(_Part):
    """Parameters and multiply-accumulates for one image, now and before pruning."""

    params: int = 0
    macs: int = 0
    params_dense: int = 0
    macs_dense: int = 0
    pruned_at_window: int | None = None
    pruned_at_round: int | None = None


class Scores(_Part):
    """Measures of one set of images against the reference."""

    frechet: float | None = None
    inception_score: float | None = None
    kid: float | None = None


class Evaluation(Scores):
    """Measures of the samples after a window, beside what real images, noise and a Gaussian fit reach."""

    window: int
    round: int
    samples: int = 0
    features: str = ""
    floor: Scores = Field(default_factory=Scores)
    noise: Scores = Field(default_factory=Scores)
    gaussian: Scores = Field(default_factory=Scores)
    seconds: float = 0.0


class ModelScore(_Part):
    """How a classifier does on `eval-data`'s test split.

    `accuracy` is a share in [0, 1], `loss` the mean cross-entropy in nats, `classes` the accuracy within each
    class, None for one without test images.
    """

    accuracy: float | None = None
    loss: float | None = None
    classes: list[float | None] = Field(default_factory=list)


class AccuracyEntry(_Part):
    """Accuracies after a window.

    `models` are measured at the cloud on `eval-data`, by name ("global", "cluster 0", "width 0.5", "exit 2");
    `clients` are the clients' accuracies on their own test images, each by the model it would use. Both may
    be empty. `samples` counts the test images at the cloud.
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
        """Mean of the clients' accuracies, each client counting the same; None without any."""
        known = self._known()
        return sum(known) / len(known) if known else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def worst10(self) -> float | None:
        """Mean over the worst tenth of the clients, rounded down but at least one (q-FedAvg's measure)."""
        known = self._known()
        worst = known[: max(1, len(known) // 10)]
        return sum(worst) / len(worst) if worst else None

    def _known(self) -> list[float]:
        return sorted(a for a in self.clients.values() if a is not None and not math.isnan(a))


class FaultEntry(_Part):
    """Something that went wrong and the run went on without; `kind` as in the protobuf `Fault`."""

    tier: str
    node: str
    kind: str
    detail: str = ""
    window: int = 0
    round: int = 0


class PrivacyEntry(_Part):
    """What a client's answers in this run cost its images, as it reports it; None where nothing was noised.

    `histogram` is the epsilon of its label counts, `dp_sgd` and `update` are epsilons at the run's ``dp-delta``. The
    first two are for one image added or removed, the third is for all of the client's images changed.
    """

    histogram: float | None = None
    dp_sgd: float | None = None
    update: float | None = None

    def take(self, metrics: Mapping[str, float]) -> None:
        """Take what a round's report says was spent; it never falls, whatever a resumed run does again."""
        if (spent := metrics.get(EPSILON["dp-sgd"])) is not None:
            self.dp_sgd = max(spent, self.dp_sgd or 0.0)
        if (spent := metrics.get(EPSILON["update"])) is not None:
            self.update = max(spent, self.update or 0.0)


class ClientEntry(_Part):
    """A client as it introduced itself."""

    samples: int = 0
    edges: list[str] = Field(default_factory=list)
    labels: list[float] = Field(default_factory=list)
    data: str = ""
    device: str = ""
    privacy: PrivacyEntry = Field(default_factory=PrivacyEntry)


class AugmentationEntry(_Part):
    """FAug before the first round, by client: images uploaded and filled up, and both privacy leakages."""

    seeds: dict[str, int] = Field(default_factory=dict)
    filled: dict[str, int] = Field(default_factory=dict)
    leakage_to_server: dict[str, float] = Field(default_factory=dict)
    leakage_between: dict[str, float] = Field(default_factory=dict)
    parameters: int = Field(default=0, description="parameters of the generator that everybody gets")
    links: dict[str, Traffic] = Field(default_factory=dict)


class RunRecord(_Part):
    """Everything report.json holds and report.html is drawn from."""

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
        """What the run's model is trained for; diffusion where the record does not say."""
        model = str(self.config.get("model", ""))
        return task_of(model) if is_model(model) else "diffusion"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fault_counts(self) -> dict[str, dict[str, int]]:
        """How many faults of each kind each tier saw."""
        counts: dict[str, dict[str, int]] = {}
        for fault in self.faults:
            kinds = counts.setdefault(fault.tier, {})
            kinds[fault.kind] = kinds.get(fault.kind, 0) + 1
        return counts

    def as_dict(self) -> dict[str, Any]:
        """Return the record in JSON's types; NaN becomes None."""
        content: dict[str, Any] = jsonable(self.model_dump())
        return content

    def write(self, folder: Path) -> Path:
        """Write ``FOLDER/report.json``, whole or not at all, and return its path.

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
            There is none, or it is not a record.
        """
        path = folder / REPORT_FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise StateError(f"{folder} holds no {REPORT_FILE}; give the --out folder of a run") from error
        except OSError as error:
            raise StateError(f"cannot read {path}: {error}; give the file to this user") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(step) for step in first["loc"]) or "the file"
            raise StateError(f"{path} is no report ({where}: {first['msg']}); run the run again") from error
