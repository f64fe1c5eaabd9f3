"""Image generators: the interface of FedKTL's pre-trained ones, and FAug's conditional GAN."""
