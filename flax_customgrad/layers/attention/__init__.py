"""Attention in tiles: scores are computed a tile at a time, and again in the backward."""
