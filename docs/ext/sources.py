"""The source of a layer, as an entry of the catalogue has it: what to show, and where it leads."""

import re


def link(source: str) -> tuple[str, str]:
    """The text and the address of a source.

    Args:
        source: an arXiv number, an issue on GitHub, another address, or a text.

    Returns:
        What a page shows, and the address; the latter is empty for a text.
    """
    if match := re.fullmatch(r"arXiv:([\w./-]+)", source):
        return source, f"https://arxiv.org/abs/{match[1]}"
    if match := re.fullmatch(r"https://github\.com/([\w./-]+)/(?:issues|pull)/(\d+)", source):
        return f"{match[1]}#{match[2]}", source
    return source, source if source.startswith("https://") else ""
