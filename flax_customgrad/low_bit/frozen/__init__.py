"""Frozen weights of 4 bits, and what is trained beside them."""
