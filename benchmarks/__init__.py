"""Paired comparisons with flax.nnx: `python -m benchmarks.layers`, `python -m benchmarks.models`.

A benchmark is not a test: nothing here asserts a time. Every workload is printed,
also the slower ones.
"""
