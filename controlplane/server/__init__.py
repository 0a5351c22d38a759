"""ADS, state of the world and delta, on one port: sessions without I/O, and the gRPC streams that feed them."""
