"""The commands of the cloud tier."""
