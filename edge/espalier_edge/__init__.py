"""The edge tier: a Fleet server to its clients and a Flower node to the cloud, in one process."""
