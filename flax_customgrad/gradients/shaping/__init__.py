"""Gradient shaping: layers that pass their input on and change its gradient."""
