"""How callers say how long they wait."""

from __future__ import annotations

import enum
from typing import Final


class Default(enum.Enum):
    """Stands for "as the setting says", where None already means "for ever"."""

    DEFAULT = "default"

    def __repr__(self) -> str:
        return "..."


DEFAULT: Final = Default.DEFAULT

Timeout = float | None | Default

FOREVER: Final = 1e6
"""Seconds. Conditions and joins overflow on infinity, on some systems on some thousand hours."""


def seconds(timeout: Timeout, setting: float, name: str = "timeout") -> float | None:
    """Return seconds, or None for ever.

    Raises:
        ValueError: Negative or not a number; it says so of *name*.
    """
    if timeout is DEFAULT:
        return setting
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout >= 0:
        raise ValueError(f"{name} must be a number of seconds, at least 0, or None for ever, not {timeout!r}")
    return None if timeout > FOREVER else float(timeout)
