"""The cloud tier: ServerApp, window planning, evaluation."""

from pathlib import Path

FLOWER_APP = Path(__file__).resolve().parent / "flower_app"
"""The folder that `flwr run` submits: a pyproject.toml that names modules of the installed packages."""
