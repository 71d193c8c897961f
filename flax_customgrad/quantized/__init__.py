"""Quantizers with the gradients of their papers, and the layers whose operands go through them."""
