"""How callers say how long they wait."""

from __future__ import annotations

import enum
import math
from typing import Final


class Default(enum.Enum):
    """Stands for "as the setting says", where None already means "for ever"."""

    DEFAULT = "default"

    def __repr__(self) -> str:
        return "..."


DEFAULT: Final = Default.DEFAULT

Timeout = float | None | Default


def seconds(timeout: Timeout, setting: float) -> float | None:
    """Return seconds, or None for ever.

    Raises:
        ValueError: Negative or not a number.
    """
    if timeout is DEFAULT:
        return setting
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout >= 0:
        raise ValueError(
            f"timeout must be a number of seconds, at least 0, or None for ever, not {timeout!r}"
        )
    # Conditions overflow on infinity and on some thousand years.
    return None if math.isinf(timeout) or timeout > 1e6 else float(timeout)
