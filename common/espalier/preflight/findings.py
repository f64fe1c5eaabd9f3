"""What preflight checks found: ok, warn or fail, and what to mend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Literal

from espalier.errors import EspalierError

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes
    ----------
    check : str
        What was looked at.
    level : str
        "ok", "warn" (it will run, look at it) or "fail" (it will not).
    said : str
        What was found.
    mend : str
        What to do; "" where all is well.
    """

    check: str
    level: Level
    said: str
    mend: str = ""


@dataclass
class Findings:
    """All findings, in the order of the checks."""

    all: list[Finding] = field(default_factory=list)

    def ok(self, check: str, said: str) -> None:
        """Note that all is well."""
        self.all.append(Finding(check, "ok", said))

    def warn(self, check: str, said: str, mend: str) -> None:
        """Note what the tier runs with, and a person should look at."""
        self.all.append(Finding(check, "warn", said, mend))

    def fail(self, check: str, said: str, mend: str) -> None:
        """Note what the tier does not run with."""
        self.all.append(Finding(check, "fail", said, mend))

    def attempt(self, check: str, action: Callable[[], str]) -> bool:
        """Add the text that `action` returns as ok, or the error that it raises as fail; return whether it is ok."""
        try:
            self.ok(check, action())
        except EspalierError as error:
            self.fault(check, error)
            return False
        return True

    def fault(self, check: str, error: EspalierError) -> None:
        """Note a fault; what to mend stands after its text's last semicolon, as in all our errors."""
        said, _, mend = str(error).rpartition("; ")
        self.fail(check, said or str(error), mend if said else "see the message")

    @property
    def failed(self) -> bool:
        """Whether anything keeps the tier from running."""
        return any(finding.level == "fail" for finding in self.all)

    def as_dicts(self) -> list[dict[str, str]]:
        """Return the findings in JSON's types."""
        return [asdict(finding) for finding in self.all]
