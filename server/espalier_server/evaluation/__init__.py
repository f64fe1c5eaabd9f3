"""What the cloud measures of a run: accuracy, image quality, cost."""
