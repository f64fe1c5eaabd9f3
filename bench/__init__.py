"""Measurements: every module here is a command, `python -m bench.NAME [--json] [--tiny] [--out DIR]`."""
