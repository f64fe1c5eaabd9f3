"""Networks, pruning and building a model from an ArchitectureSpec."""
