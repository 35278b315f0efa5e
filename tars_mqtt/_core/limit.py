"""How long an attempt to connect may go on."""

from __future__ import annotations

import time
from collections.abc import Callable

import attrs


class Interrupted(Exception):  # noqa: N818 - not an error: somebody wants the network thread to leave
    """The attempt was called off."""


@attrs.frozen
class Limit:
    """Until when something may be waited for, unless somebody calls it off before.

    Args:
        deadline: On the monotonic clock.
        called_off: Asked often.
    """

    deadline: float
    called_off: Callable[[], bool]

    def left(self) -> float:
        """Seconds; none, or less than that, when the time is up.

        Raises:
            Interrupted: It was called off.
        """
        if self.called_off():
            raise Interrupted
        return self.deadline - time.monotonic()

    def share(self, parts: int) -> Limit:
        """The first of so many equal parts of what is left: what one does not need is the others'."""
        now = time.monotonic()
        return attrs.evolve(self, deadline=now + (self.deadline - now) / parts)
