"""The normalizations: of activations, and of weights."""
