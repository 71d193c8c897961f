"""Convolutions, with lowerings chosen for the shape and the platform."""
