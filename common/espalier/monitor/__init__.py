"""Looking on: health, the live view of a tree, metrics and structured logs."""
