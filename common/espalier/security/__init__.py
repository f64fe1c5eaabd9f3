"""Addresses, TLS, certificates and node keys."""
