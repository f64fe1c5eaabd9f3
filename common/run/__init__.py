"""Run configuration, checkpoints, ledger and report."""
