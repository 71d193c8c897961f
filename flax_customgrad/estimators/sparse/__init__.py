"""The sparse family: weights of which most stay zero, and a gradient that decides which."""
