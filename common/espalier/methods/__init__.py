"""One algorithm a file, the parts they share, and the registry."""
