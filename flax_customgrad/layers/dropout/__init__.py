"""Dropout, whose backward keeps a bit an element, or the key alone."""
