"""Training on text, by bytes."""
