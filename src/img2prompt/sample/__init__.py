"""The competition made on the spot."""
