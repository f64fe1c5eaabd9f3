"""The adapter to Flower: the only package that touches Flower internals."""

from common.flower.without_sql import leave_out

leave_out()  # before anything of Flower's is imported
