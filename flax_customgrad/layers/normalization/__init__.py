"""Normalizations of activations."""
