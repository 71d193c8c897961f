"""What the library knows of itself: its operations, and what a catalogue entry is."""
