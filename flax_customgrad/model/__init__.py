"""Tools for whole models."""
