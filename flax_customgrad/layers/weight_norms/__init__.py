"""Wrappers that normalize the weights of a layer."""
