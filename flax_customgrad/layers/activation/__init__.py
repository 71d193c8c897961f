"""Activations: pointwise, gated, softmax; as functions of the names of flax.nnx."""
