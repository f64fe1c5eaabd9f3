"""An unfinished run as its event log reports it, for the supervisor."""

from __future__ import annotations

from dataclasses import dataclass

from espalier_server.processes import process_alive
from espalier_server.records.events import FINAL, read_from
from espalier_server.superlink.submission import Submission


@dataclass
class WatchedRun:
    """An unfinished run and the state that its event log reports.

    Attributes
    ----------
    submission : Submission
        Its last submission.
    offset : int
        Number of bytes of the event log that have been read.
    pid : int, optional
        Process id of its ServerApp; None before the first event.
    ended : bool
        Whether the log holds a final event, or the run is not resubmitted.
    deaths : int
        How often its ServerApp ended without a final event since the last checkpoint.
    """

    submission: Submission
    offset: int
    pid: int | None = None
    ended: bool = False
    deaths: int = 0

    def read_events(self) -> None:
        """Read the events written since the last call."""
        events, self.offset = read_from(self.submission.events, self.offset)
        for event in events:
            if event["event"] == "run":
                self.pid = event.get("pid")
            elif event["event"] == "checkpoint":
                self.deaths = 0
            elif event["event"] in FINAL:
                self.ended = True

    @property
    def dead(self) -> bool:
        """Whether its ServerApp ended without a final event."""
        return not self.ended and self.pid is not None and not process_alive(self.pid)
