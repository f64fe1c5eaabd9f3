"""Planning of windows: the members of a run, the participants of each round, and their edges."""
