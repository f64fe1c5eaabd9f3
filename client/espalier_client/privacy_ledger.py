"""The privacy ledger of a device: the differential privacy that it has spent over all runs; it only grows."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from espalier.errors import ConfigError, StateError
from espalier.names import check_name
from espalier.storage.json_file import write_json
from espalier_client.histogram import add_laplace_noise
from espalier_client.privacy_accounting import Mechanism, epsilon_of

Kind = Literal["dp-sgd", "update"]

#: Delta of a device's own limit; a run's `dp-delta` is the cloud's choice.
LIMIT_DELTA = 1e-5

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Spent = tuple[_Positive, Annotated[float, Field(gt=0, le=1)], Annotated[int, Field(ge=1)]]


class _Histogram(BaseModel):
    model_config = ConfigDict(extra="forbid")
    epsilon: _Positive
    counts: list[float]


class _Run(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    histogram: _Histogram | None = None
    dp_sgd: list[_Spent] = Field(default_factory=list, alias="dp-sgd")
    update: list[_Spent] = Field(default_factory=list)

    def spent(self, kind: Kind) -> list[_Spent]:
        return self.dp_sgd if kind == "dp-sgd" else self.update


class _Ledger(BaseModel):
    model_config = ConfigDict(extra="forbid")
    schema_: Literal[1] = Field(default=1, alias="schema")
    runs: dict[str, _Run] = Field(default_factory=dict)


class PrivacyLedger:
    """A device's ledger of spent privacy, in one file that is written before a reply leaves the device.

    It is not part of the versioned state: a reply stays spent when its round is discarded and repeated. It is never
    cleared, because the next run uses the same images.

    Parameters
    ----------
    path : Path
        The ledger's file.
    limit : float
        Largest epsilon at `LIMIT_DELTA` over all runs that the owner allows; 0: no limit.
    """

    def __init__(self, path: Path, limit: float = 0.0) -> None:
        self.path, self.limit = path, limit
        self._lock = threading.Lock()

    def histogram(self, run: str, counts: np.ndarray, epsilon: float, rng: np.random.Generator) -> np.ndarray:
        """Return a run's noisy label counts, drawn once and stored: repeated draws would average the noise out.

        Raises
        ------
        ConfigError
            The run received counts with another epsilon before, or the owner's limit does not allow it.
        StateError
            The ledger cannot be read or written.
        """
        with self._lock:
            ledger, entry = self._entry(run)
            if entry.histogram is None:
                entry.histogram = _Histogram(
                    epsilon=epsilon, counts=add_laplace_noise(counts, epsilon, rng).tolist()
                )
                self._check_limit(ledger)
                self._write(ledger)
            elif entry.histogram.epsilon != epsilon or len(entry.histogram.counts) != len(counts):
                raise ConfigError(
                    f"run {run} has this device's label counts with histogram-epsilon="
                    f"{entry.histogram.epsilon:g}; a second histogram would spend more privacy: restore the setting "
                    "and the data's classes, or start a new run"
                )
            return np.array(entry.histogram.counts)

    def charge(self, run: str, kind: Kind, mechanism: Mechanism) -> None:
        """Record the privacy that a round is about to spend.

        Raises
        ------
        ConfigError
            The owner's limit does not allow it; nothing is recorded.
        StateError
            The ledger cannot be read or written; then no reply may leave the device.
        """
        with self._lock:
            ledger = self._add(run, kind, mechanism)
            self._check_limit(ledger)
            self._write(ledger)

    def epsilon(self, run: str, kind: Kind, delta: float, more: Mechanism | None = None) -> float:
        """Return the epsilon that a run's rounds of one kind have spent at `delta`, including `more` if given."""
        with self._lock:
            ledger = self._read() if more is None else self._add(run, kind, more)
        entry = ledger.runs.get(run)
        return epsilon_of(entry.spent(kind), delta) if entry else 0.0

    def total(self) -> float:
        """Return the epsilon over all runs at `LIMIT_DELTA`, summed over histograms and rounds of both kinds."""
        with self._lock:
            return _total(self._read())

    # --- the file ----------------------------------------------------------------------------------

    def _add(self, run: str, kind: Kind, mechanism: Mechanism) -> _Ledger:
        ledger, entry = self._entry(run)
        spent = entry.spent(kind)
        if spent and spent[-1][:2] == (mechanism.noise, mechanism.rate):
            spent[-1] = (*spent[-1][:2], spent[-1][2] + mechanism.steps)
        else:
            spent.append((mechanism.noise, mechanism.rate, mechanism.steps))
        return ledger

    def _entry(self, run: str) -> tuple[_Ledger, _Run]:
        check_name(run, "run id")
        ledger = self._read()
        return ledger, ledger.runs.setdefault(run, _Run())

    def _read(self) -> _Ledger:
        try:
            return _Ledger.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return _Ledger()
        except OSError as error:
            raise StateError(f"cannot read {self.path}: {error}; give the file to this user") from error
        except ValidationError as error:
            raise StateError(
                f"{self.path} is damaged, so the privacy spent is unknown; restore it from a copy, or remove it to "
                "start at zero"
            ) from error

    def _write(self, ledger: _Ledger) -> None:
        write_json(self.path, ledger.model_dump(by_alias=True))

    def _check_limit(self, ledger: _Ledger) -> None:
        if self.limit and (total := _total(ledger)) > self.limit:
            raise ConfigError(
                f"this device's privacy budget is used up: epsilon would be {total:.3g}, its owner allows "
                f"{self.limit:g} (--privacy-budget)"
            )


def _total(ledger: _Ledger) -> float:
    histograms = sum(run.histogram.epsilon for run in ledger.runs.values() if run.histogram)
    rounds = [spent for run in ledger.runs.values() for spent in (*run.dp_sgd, *run.update)]
    return histograms + epsilon_of(rounds, LIMIT_DELTA)
