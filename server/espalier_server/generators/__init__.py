"""Pre-trained image generators at the cloud, and the training of a small one."""
