"""The recipes of convolutions: each a way to compute `correlate` and `kernel_gradient`."""
