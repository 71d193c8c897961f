"""The categorical family: a choice among classes, with the gradient of a softmax."""
