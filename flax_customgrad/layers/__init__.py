"""Drop-ins for the layers of `flax.nnx`: same results, better gradients."""
