"""Quantizers, each with the gradient of its paper."""
