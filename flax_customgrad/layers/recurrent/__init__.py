"""Recurrent layers: the cells of flax.nnx, layers that run them over time, linear recurrences."""
