"""The objective of each task (diffusion, classification), and its loss and gradient over a data set."""
