"""Wait for something to become true, instead of sleeping and hoping."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from tars_mqtt import ConnectError

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


def connect_error(
    client: Any, *reasons: str, enough: Callable[[], bool] = lambda: True, wait: float = 0.5
) -> str:
    """What the error of a failing ``connect()`` says, once it gives all the *reasons*.

    A connect that is given up before its first attempt has failed cannot know why, so it is
    called again with more time: how long an attempt needs is up to the machine.

    Args:
        enough: What must have happened besides, or it is called again.
        wait: Seconds for the first call.

    Raises:
        AssertionError: With 16 times as long, it still does not say so.
    """
    missing, said = list(reasons), ""
    for timeout in (wait, 4 * wait, 16 * wait):
        with pytest.raises(ConnectError) as caught:
            client.connect(timeout=timeout)
        said = str(caught.value)
        missing = [reason for reason in reasons if reason not in said]
        if not missing and enough():
            return said
    raise AssertionError(f"not in the error: {missing}, or not enough has happened ({said})")
