"""The control messages (espalier.proto) and the code generated from them."""
