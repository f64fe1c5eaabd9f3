"""Starts a client container of docker-compose.yml in a free place: a name, a node key and a share of the data.

Scaled containers are all alike, so each takes the first place that no other one holds. The lock that says so is
passed on to `espalier client` and lasts as long as that process, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Mapping
from pathlib import Path

STATE = Path("/state")
#: Where the healthcheck finds the state folder of this container's place.
LINK = Path("/tmp/state")


def take(state: Path, places: int) -> int:
    """Take a place, for as long as this process lives and whatever it becomes.

    Parameters
    ----------
    state : Path
        Folder of all places, shared by the containers.
    places : int
        How many there are.

    Returns
    -------
    int
        Number of the place, from 1.

    Raises
    ------
    SystemExit
        All are taken.
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
        f"error: all {places} places are taken; set PLACES in .env to the number of clients, and up again"
    )


def share(number: int, env: Mapping[str, str]) -> str:
    """Return the data SPEC of a place.

    The data are dealt to the first SHARES places; those after them get shares of another draw, which overlap
    with the first ones': what others hold already cannot be dealt again.

    Parameters
    ----------
    number : int
        The place, from 1.
    env : mapping
        DATA (a source), SCHEME (how it is divided) and SHARES (among how many).
    """
    shares = int(env.get("SHARES", "4"))
    draw, index = divmod(number - 1, shares)
    scheme, plus, options = env.get("SCHEME", "iid").partition("+")
    seed = f",seed={draw}" if draw else ""
    return f"{env.get('DATA', 'digits')}:{index}/{shares}:{scheme}{seed}{plus}{options}"


def main() -> None:
    """Become `espalier client` in the place taken; further arguments are passed on."""
    number = take(STATE, int(os.environ.get("PLACES", "16")))
    name = f"client-{number}"
    LINK.unlink(missing_ok=True)
    LINK.symlink_to(STATE / name)
    arguments = ["--name", name, "--state", str(STATE / name), "--data", share(number, os.environ)]
    os.execvp("espalier", ["espalier", "client", *arguments, *sys.argv[1:]])


if __name__ == "__main__":
    main()
