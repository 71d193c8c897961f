"""The microscaling family: products of 4- and 8-bit floats, of which each block has a scale."""
