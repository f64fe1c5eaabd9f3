"""Local training, objectives, diffusion and quality measures."""
