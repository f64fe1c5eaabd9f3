"""Starts a client container of docker-compose.yml in a free place: a name, a node key and a share of the data.

The containers of a scaled service have the same configuration, so each takes the first place that is not locked.
`espalier client` inherits the lock; the kernel releases it when that process ends.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Mapping
from pathlib import Path

STATE = Path("/state")
#: Link to the state folder of this container's place, for the health check.
LINK = Path("/tmp/state")


def take(state: Path, places: int) -> int:
    """Lock the first free place, until this process or the program that replaces it ends.

    Parameters
    ----------
    state : Path
        Folder that contains the state folders of all places, shared by the containers.
    places : int
        Number of places.

    Returns
    -------
    int
        Number of the place, from 1.

    Raises
    ------
    SystemExit
        All places are taken.
    """
    for number in range(1, places + 1):
        folder = state / f"client-{number}"
        folder.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(folder / "place.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        os.set_inheritable(descriptor, True)
        return number
    sys.exit(
        f"error: all {places} places are taken; set PLACES in .env to the number of clients and start again"
    )


def share(number: int, env: Mapping[str, str]) -> str:
    """Return the data SPEC of a place.

    The data are divided among the first SHARES places. Further places get shares of a division with another
    seed, which overlap with those of the first places.

    Parameters
    ----------
    number : int
        The place, from 1.
    env : mapping
        DATA (a source), SCHEME (the partition scheme) and SHARES (the number of shares).
    """
    shares = int(env.get("SHARES", "4"))
    seed, index = divmod(number - 1, shares)
    scheme, plus, options = env.get("SCHEME", "iid").partition("+")
    seed_option = f",seed={seed}" if seed else ""
    return f"{env.get('DATA', 'digits')}:{index}/{shares}:{scheme}{seed_option}{plus}{options}"


def main() -> None:
    """Replace this process by `espalier client` in a free place, with this program's arguments added."""
    number = take(STATE, int(os.environ.get("PLACES", "16")))
    name = f"client-{number}"
    LINK.unlink(missing_ok=True)
    LINK.symlink_to(STATE / name)
    arguments = ["--name", name, "--state", str(STATE / name), "--data", share(number, os.environ)]
    os.execvp("espalier", ["espalier", "client", *arguments, *sys.argv[1:]])


if __name__ == "__main__":
    main()
