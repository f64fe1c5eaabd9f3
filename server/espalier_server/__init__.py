"""The cloud tier: ServerApp, window planning, evaluation."""
