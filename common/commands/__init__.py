"""What the commands of `espalier` do, one module each; `common/cli.py` only reads their options."""
