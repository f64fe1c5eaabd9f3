"""The Flower server inside the edge process: Fleet gRPC for the clients below it."""

import espalier.flower  # noqa: F401  # leaves SQLAlchemy out, before anything of Flower is imported
