"""The SuperLink and the runs on it: supervision, submission, and the Grid over it."""

import espalier.flower  # noqa: F401  # leaves SQLAlchemy out, before anything of Flower is imported
