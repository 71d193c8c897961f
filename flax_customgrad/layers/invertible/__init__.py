"""Layers whose input is computed from their output again, so that it need not be kept."""
