"""FedKTL: knowledge transfer by a pre-trained generator (Zhang et al., CVPR 2024, arXiv 2403.15760).

In the order of the paper's algorithm: `objectives` is what a client minimises and sends, `method` how it is
aggregated and what the cloud does, `alignment` the training of the feature transformer, `networks` the networks of
both sides.
"""

from espalier.methods.fedktl.method import FedKTL

__all__ = ["FedKTL"]
