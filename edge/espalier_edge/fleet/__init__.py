"""The Flower server in the edge process: the Fleet API (gRPC) for the edge's clients."""

import espalier.flower  # noqa: F401  # installs stubs for SQLAlchemy before Flower is imported
