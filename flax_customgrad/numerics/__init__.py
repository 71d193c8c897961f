"""Arithmetic that several families share."""
