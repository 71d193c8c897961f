"""Layers timed against those of flax.nnx, in pairs, on the workloads of the catalogue."""
