"""Paired comparisons with flax.nnx: `python -m benchmarks.layers`, `python -m benchmarks.tracing`.

A benchmark is no test: nothing here asserts a time. Every workload is shown, the losing ones too.
"""
