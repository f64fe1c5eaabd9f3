"""Creates the certificates, node keys and registrations of docker-compose.yml, and keeps existing ones.

Each tier has a volume that contains its own secrets only; the authority's key is in a volume that only this
program mounts. Each `docker-compose up` runs it, and so renews certificates that are about to expire.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
from collections.abc import Sequence
from pathlib import Path

from espalier.commands import members
from espalier.security.certificates import facts
from espalier_server.commands import certs

TIERS = Path("/tiers")
RENEW_DAYS = 30.0


def provision(tiers: Path, edges: Sequence[str], clients: int) -> list[str]:
    """Create what is missing below `tiers`, a folder per volume.

    Parameters
    ----------
    tiers : Path
        Holds ``authority``, ``cloud``, ``clients`` and one folder per edge.
    edges : sequence of str
        Names of the edges, which are also their host names.
    clients : int
        Number of places for clients: ``client-1`` to ``client-N``.

    Returns
    -------
    list of str
        A description of each thing created.
    """
    authority = tiers / "authority"
    created: list[str] = []
    if not (authority / certs.CA).exists():
        certs.init(folder=authority)
        created.append("an authority")
    for name in ("cloud", *edges):
        out = tiers / name / "tls"
        renew = _expires_soon(out / certs.CERTIFICATE)
        if renew or not (out / certs.CERTIFICATE).exists():
            if name == "cloud":
                certs.cloud([name], authority, out, renew=renew)
            else:
                certs.edge(name, [name], authority, out, renew=renew)
            created.append(f"the certificate of {name}")
        if name != "cloud":
            members.add_edge(name, out / certs.NODE_PUBLIC, tiers / "cloud")
    shutil.copy(authority / certs.CA, tiers / "clients" / certs.CA)
    for name in (f"client-{number}" for number in range(1, clients + 1)):
        folder = tiers / "clients" / name  # its state folder, where a client looks for its key
        if not (folder / certs.NODE_KEY).exists():
            certs.client(name, authority, folder)
            created.append(f"the key of {name}")
        for tier in ("cloud", *edges):
            members.add_client(name, folder / certs.NODE_PUBLIC, tiers / tier)
    return created


def _expires_soon(certificate: Path) -> bool:
    if not certificate.exists():
        return False
    return facts(certificate.read_bytes(), str(certificate))[0].days_left < RENEW_DAYS


def main() -> None:
    """Run the service `certs`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edges", nargs="+", required=True)
    parser.add_argument("--clients", type=int, required=True)
    arguments = parser.parse_args()
    with contextlib.redirect_stdout(io.StringIO()):  # the commands print hints for interactive use
        created = provision(TIERS, arguments.edges, arguments.clients)
    print("\n".join(f"created {what}" for what in created) or "nothing to create")


if __name__ == "__main__":
    main()
