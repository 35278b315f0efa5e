"""What becomes of a delivery whose handler failed."""

from __future__ import annotations

import enum
import logging
import random
from collections.abc import Callable

import attrs

from tars_mqtt._core.lane import Delivery

logger = logging.getLogger("tars_mqtt.dispatch")

RetryOn = type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], bool]

_LONGEST_DELAY = 300.0


class Outcome(enum.Enum):
    """How the attempt to handle one delivery came out."""

    HANDLED = "handled"
    SKIPPED = "skipped"
    """A duplicate: there was nothing to do."""
    FAILED = "failed"
    HOPELESS = "hopeless"
    """Another attempt would fail in the same way."""


@attrs.frozen(kw_only=True)
class Recovery:
    """How one subscription deals with failures.

    Retries hold their lane: order is kept, other lanes and other keys go on.
    """

    retries: int = 0
    retry_delay: float = 0.5
    """Seconds before the first retry; doubled for each further one."""
    retry_on: RetryOn = BaseException
    """Which failures another attempt may cure."""
    timeout: float | None = None
    """Seconds after which a handler that does not return counts as failed."""
    bury: Callable[[Delivery, Callable[[], None]], None] | None = None
    """Sends a delivery to the dead letters, and calls back when the broker has it."""
    client_id: str = ""

    def verdict(self, error: BaseException) -> Outcome:
        """What it means that a handler raised *error*. A function of the user's that fails itself forbids nothing."""
        retry_on = self.retry_on
        if isinstance(retry_on, (type, tuple)):
            curable = isinstance(error, retry_on)
        else:
            try:
                curable = bool(retry_on(error))
            except Exception:
                logger.exception(
                    "retry_on failed on %s", type(error).__qualname__, extra={"client_id": self.client_id}
                )
                curable = True
        return Outcome.FAILED if curable else Outcome.HOPELESS

    def delay(self, delivery: Delivery, outcome: Outcome) -> float | None:
        """Seconds until the next attempt; None when there is none."""
        if outcome is not Outcome.FAILED or delivery.failures > self.retries:
            return None
        ceiling = min(_LONGEST_DELAY, self.retry_delay * 2.0 ** min(delivery.failures - 1, 32))
        # Half fixed, half drawn: never at once, and not all together.
        return random.uniform(ceiling / 2, ceiling)
