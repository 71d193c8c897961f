"""Networks on handwritten digits: the task of `train`, and those of the other commands."""
