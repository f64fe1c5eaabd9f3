"""Write the table of settings in the Flower app's pyproject.toml: ``python -m tests.support.app_config``."""

from __future__ import annotations

import json

from espalier.methods.run_config import RunConfig
from espalier_server import FLOWER_APP

HEAD = "[tool.flwr.app.config]\n"


def table() -> str:
    """Return every setting with its default, in TOML."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in RunConfig().to_flat().items())


def main() -> None:
    """Replace the table, which ends the file."""
    path = FLOWER_APP / "pyproject.toml"
    before, _, _ = path.read_text(encoding="utf-8").partition(HEAD)
    path.write_text(before + HEAD + table(), encoding="utf-8")


if __name__ == "__main__":
    main()
