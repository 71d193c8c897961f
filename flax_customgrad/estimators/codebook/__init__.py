"""Codebooks: vectors replaced by the nearest of a few, and the gradients that pass through."""
