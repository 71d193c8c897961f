"""Layers that multiply in int8."""
