"""Losses: cross entropies of softmax and sigmoid, of an output layer, and CTC."""
