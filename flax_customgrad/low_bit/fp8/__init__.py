"""Layers that multiply in 8-bit floats, with scales of this step or of the last ones."""
