"""The catalogue's entries of the normalization family."""

from flax_customgrad.catalogue.entry import Entry

NORMALIZATION: tuple[Entry, ...] = ()
