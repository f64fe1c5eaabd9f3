"""An authority's files and certificates of it, for tests."""

from __future__ import annotations

from pathlib import Path

from espalier_server.certificate_authority import issue, new_authority


class Authority:
    """A made-up authority; its files lie in a folder."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder, self.roots = folder, folder / f"{name}.pem"
        self._pair = new_authority(name, 365)
        self.roots.write_bytes(self._pair.certificate)

    def issue(
        self, name: str, hosts: tuple[str, ...] = ("127.0.0.1", "localhost"), days: float = 90
    ) -> tuple[Path, Path]:
        """Return the files of a certificate and its key; with negative `days` it has expired."""
        pair = issue(self._pair, hosts, days)
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certificate.write_bytes(pair.certificate)
        key.touch(mode=0o600)
        key.write_bytes(pair.private_key)
        return certificate, key
