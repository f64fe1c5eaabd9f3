"""The device tier: the ClientApp and the resident client process."""
