"""The lowerings of convolutions: each a way to compute a convolution and its kernel's gradient."""
