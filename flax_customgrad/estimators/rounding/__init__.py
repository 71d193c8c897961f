"""Straight-through estimators: rounding, signs and steps with a gradient put in their place."""
