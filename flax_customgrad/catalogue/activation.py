"""The catalogue's entries of the activation family."""

from flax_customgrad.catalogue.entry import Entry

ACTIVATION: tuple[Entry, ...] = ()
