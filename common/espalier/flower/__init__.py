"""The adapter to Flower: the only package that touches Flower internals."""

from espalier.flower.stub_sqlalchemy import leave_out

leave_out()  # before anything of Flower's is imported
