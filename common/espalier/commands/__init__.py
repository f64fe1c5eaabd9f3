"""Commands of `espalier` that need the base installation only, and options that the commands of several tiers share."""

COMMANDS = "espalier.commands"
"""Entry-point group of the commands."""
