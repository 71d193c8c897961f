"""Gradients through steps: straight-through and other surrogate estimators."""
