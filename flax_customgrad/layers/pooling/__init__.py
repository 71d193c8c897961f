"""Pooling: maxima, minima and means of windows."""
