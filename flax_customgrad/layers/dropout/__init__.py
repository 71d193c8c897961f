"""Dropout, whose backward keeps a mask, its bits, or the key alone."""
