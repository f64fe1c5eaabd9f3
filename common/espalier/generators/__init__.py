"""Image generators behind one small interface: what FedKTL's cloud aligns knowledge with."""
