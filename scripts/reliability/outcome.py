"""What a measurement came to."""

from __future__ import annotations

import attrs


@attrs.frozen
class Outcome:
    """In words for the table, and whether that is what is wanted."""

    text: str
    met: bool = True
