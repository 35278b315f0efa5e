"""What others wrote, as a log may have it."""

from __future__ import annotations

from typing import Final

_MOST_CHARACTERS: Final = 500


def printable(text: str) -> str:
    """Return *text* on one line, without escape sequences, and shortened if it is long.

    A topic or an id with a line break in it could forge a line of a log, with ANSI codes hide one.
    """
    if len(text) > _MOST_CHARACTERS:
        text = text[: _MOST_CHARACTERS - 1] + "…"
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
