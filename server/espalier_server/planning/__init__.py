"""Which clients take part in a window, and at which edges."""
