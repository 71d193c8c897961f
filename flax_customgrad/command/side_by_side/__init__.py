"""A network trained plain and converted, side by side, on the data of a task."""
