"""The adapter to Flower: the resident node, and what it shares with the adapters of edge and server.

Only this package, `espalier_edge.fleet` and `espalier_server.superlink` import modules of Flower that are not public.
"""

from espalier.flower.stub_sqlalchemy import install_stubs

install_stubs()  # before any module of Flower is imported
