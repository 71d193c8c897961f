"""The frozen family: weights that are not trained, in 4 bits, and what is trained beside them."""
