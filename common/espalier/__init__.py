"""Hierarchical federated learning over Flower: what cloud, edges and clients share."""
