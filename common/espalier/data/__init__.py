"""Data sets, partitions and label histograms."""
