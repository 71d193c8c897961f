"""Activations whose backward keeps a few bits per element, for a derivative of a few steps."""
