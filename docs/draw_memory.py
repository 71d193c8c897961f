"""Draws the picture of the README: the memory that the quickstart measures, as it measures it.

python docs/draw_memory.py
"""

from pathlib import Path

import matplotlib
from run_page import run

HERE = Path(__file__).parent

if __name__ == "__main__":
    # The same file from the same numbers, so that it changes only where they do.
    matplotlib.rcParams["svg.hashsalt"] = "flax-customgrad"
    figure = run(HERE / "quickstart.md")["figure"]
    figure.savefig(HERE / "_static" / "memory.svg", metadata={"Date": None}, facecolor="white")
