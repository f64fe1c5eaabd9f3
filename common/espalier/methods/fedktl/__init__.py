"""FedKTL: knowledge transfer by a pre-trained generator (Zhang et al., CVPR 2024, arXiv 2403.15760).

In the order of the paper's algorithm: `method` holds the class and the aggregation, `client` what a client
minimises and sends, `alignment` the training of the feature transformer at the cloud. The last two define torch
classes.
"""

from espalier.methods.fedktl.method import FedKTL

__all__ = ["FedKTL"]
