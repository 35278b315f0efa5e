"""Wait for something to become true, instead of sleeping and hoping."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def eventually(
    predicate: Callable[[], T],
    timeout: float = 30.0,
    message: str | Callable[[], str] = "",
    *,
    interval: float = 0.005,
) -> T:
    """Ask *predicate* again and again until its answer is true, and return that answer.

    Args:
        message: What was waited for; as a callable it is asked at the end, and can tell what was there.

    Raises:
        AssertionError: It was still not true after *timeout*. Errors of the predicate itself pass through.
    """
    deadline = time.monotonic() + timeout
    while True:
        answer = predicate()
        if answer:
            return answer
        if time.monotonic() >= deadline:
            what = message() if callable(message) else message
            raise AssertionError(
                f"not within {timeout:g} s: {what or repr(predicate)} (last answer: {answer!r})"
            )
        time.sleep(interval)
