"""Layers whose weights, inputs and gradients go through quantizers."""
