"""Text that has to fit on a page."""

from __future__ import annotations


def shorten(text: str, length: int) -> str:
    """Cuts `text` to at most `length` characters; an ellipsis replaces what is missing."""
    if len(text) <= length:
        return text
    return text[: length - 1].rstrip() + "…"
