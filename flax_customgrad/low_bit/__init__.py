"""Training and inference in few bits."""
