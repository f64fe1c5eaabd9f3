"""The adapter to Flower: the only package that touches Flower internals."""
