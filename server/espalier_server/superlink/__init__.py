"""The SuperLink and the runs on it: supervision, submission, and the Grid over it."""

import espalier.flower  # noqa: F401  # installs stubs for SQLAlchemy before Flower is imported
