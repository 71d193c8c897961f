"""The main job: one network on handwritten digits, trained plainly and converted, side by side."""
