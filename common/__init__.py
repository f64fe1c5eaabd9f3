"""What all tiers share; imports nothing of client, edge or server."""
