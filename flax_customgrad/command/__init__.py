"""The commands of `python -m flax_customgrad`: each a module with `add_arguments` and `run`."""
