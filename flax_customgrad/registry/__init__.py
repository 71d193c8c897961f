"""The registry: operations by name, the type of a catalogue entry, and public names."""
