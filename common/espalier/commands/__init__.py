"""What the commands of `espalier` do, one module each; `common/espalier/cli.py` only reads their options."""
