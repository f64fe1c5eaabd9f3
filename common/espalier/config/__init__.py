"""A run's settings and time limits."""
