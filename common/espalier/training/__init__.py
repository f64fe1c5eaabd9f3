"""Local training: loops, optimisers, objectives, privacy."""
