"""Convolution and pooling: lowerings chosen for the shape and the platform."""
