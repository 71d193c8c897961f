"""Spiking neurons: surrogate gradients of a spike, and cells that integrate, fire and reset."""
