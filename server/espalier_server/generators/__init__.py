"""Pre-trained image generators at the cloud, and training one."""
