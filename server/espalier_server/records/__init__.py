"""A run on disk: events, checkpoints, record and report."""
