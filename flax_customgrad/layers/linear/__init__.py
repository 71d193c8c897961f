"""The linear family: products of an input with a kernel, and lookups in a table."""
