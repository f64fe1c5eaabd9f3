"""Commands that the cloud contributes to `espalier`."""
