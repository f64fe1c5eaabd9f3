"""Names of clients and edges: they appear in files, logs and reports, so they stay plain."""

from __future__ import annotations

import re

from common.errors import WireError

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")


def check_name(name: str) -> None:
    """Refuse a name that is not 1 to 64 letters, digits, dots, dashes and underscores.

    Raises
    ------
    WireError
        If it is anything else, or starts or ends with a sign.
    """
    if not _NAME.fullmatch(name):
        raise WireError(name[:64], "a name is 1 to 64 letters, digits, '.', '-' or '_', no sign at either end")
