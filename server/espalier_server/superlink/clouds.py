"""The registry of clouds that run on this machine, by name."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from espalier.errors import ConfigError
from espalier.storage.atomic import write_text
from espalier.storage.json_file import write_json
from espalier.storage.lock import is_locked

CLOUD_FILE = "cloud.json"


@dataclass(frozen=True)
class Cloud:
    """A running cloud.

    Attributes
    ----------
    name : str
        Name for ``espalier run --cloud``.
    listen, control : str
        Addresses of its Fleet API (for edges) and Control API (for this machine).
    pid : int
        Process id of its supervisor.
    state : str
        Its state folder.
    root_certificates : str
        PEM file of the authority of its certificate; empty without TLS.
    monitor : str
        Address of its monitoring service; empty if it has none.
    """

    name: str
    listen: str
    control: str
    pid: int
    state: str
    root_certificates: str = ""
    monitor: str = ""

    @property
    def folder(self) -> Path:
        """The state folder."""
        return Path(self.state)

    @property
    def flwr_home(self) -> Path:
        """The folder of Flower's own configuration and installed apps."""
        return self.folder / "flwr"

    def register(self) -> None:
        """Write ``STATE/cloud.json``, the per-user registry and the connection that Flower's CLI reads.

        Raises
        ------
        StateError
            The state folder or the registry cannot be written to.
        """
        security = f"root-certificates = {json.dumps(self.root_certificates)}"
        connection = (
            f'[superlink]\ndefault = "espalier"\n\n[superlink.espalier]\naddress = "{self.control}"\n'
        )
        write_text(
            self.flwr_home / "config.toml",
            connection + (security if self.root_certificates else "insecure = true") + "\n",
        )
        for path in registry().glob("*.json"):
            other = _read(path)
            if other is not None and not other.running:  # it was killed before it could unregister
                path.unlink(missing_ok=True)
        for path in (self.folder / CLOUD_FILE, registry() / f"{self.name}.json"):
            write_json(path, asdict(self))

    def unregister(self) -> None:
        """Remove the cloud from the registry, unless its entry is that of another cloud of the same name."""
        path = registry() / f"{self.name}.json"
        if _read(path) == self:
            path.unlink(missing_ok=True)

    @property
    def running(self) -> bool:
        """Whether a process owns the state folder."""
        return is_locked(self.folder)


def registry() -> Path:
    """Return the registry's folder, with one file for each cloud of this user."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "espalier" / "clouds"


def running_clouds() -> list[Cloud]:
    """Return the running clouds, ordered by name."""
    clouds = [cloud for path in sorted(registry().glob("*.json")) if (cloud := _read(path)) is not None]
    return [cloud for cloud in clouds if cloud.running]


def find_cloud(name: str) -> Cloud:
    """Return the running cloud of a name.

    Raises
    ------
    ConfigError
        No cloud of this name runs on this machine.
    """
    clouds = {cloud.name: cloud for cloud in running_clouds()}
    if name in clouds:
        return clouds[name]
    others = f"running: {', '.join(clouds)}" if clouds else "none is running"
    raise ConfigError(
        f"no cloud named {name!r} runs on this machine ({others}); start one with "
        "`espalier cloud --listen HOST:PORT --control 127.0.0.1:PORT --state DIR`, or name it with --cloud"
    )


def _read(path: Path) -> Cloud | None:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Cloud(**json.loads(path.read_text(encoding="utf-8")))
    return None
