"""Training of image generators at the cloud."""
