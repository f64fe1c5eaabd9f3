"""Tests of the built wheel in environments of its own; `make test-wheel` runs them."""
