"""Gradients that are changed on purpose."""
