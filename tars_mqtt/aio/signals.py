"""SIGINT and SIGTERM on a loop, which has one handler for each, though several clients may run there."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import weakref
from collections.abc import Callable, Iterator
from typing import Any


class _Signals:
    """Those of one loop, from the first who wants to be told of them to the last."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.ends: list[Callable[[], None]] = []
        self._loop = loop
        self._before: dict[signal.Signals, Any] = {}

    def take(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if _is_of_a_loop(handler):
                continue  # somebody else has put it there, and it could not be put back
            # Neither on other threads than the main one, nor on Windows.
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
                self._loop.add_signal_handler(number, self._tell)
                self._before[number] = handler

    def give_back(self) -> None:
        for number, handler in self._before.items():
            self._loop.remove_signal_handler(number)
            if handler is not None:  # asyncio's own for Ctrl-C, for instance
                signal.signal(number, handler)

    def _tell(self) -> None:
        for end in tuple(self.ends):
            end()


_signals: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Signals] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def on_signals(loop: asyncio.AbstractEventLoop, end: Callable[[], None]) -> Iterator[None]:
    """While inside, have *end* called on SIGINT and SIGTERM, beside those of other clients.

    Where somebody else has given the loop a handler, that stays, and what ends then is for them to say. On other
    threads than the main one, and on Windows, nothing happens.
    """
    signals = _signals.get(loop)
    if signals is None:
        signals = _Signals(loop)
        signals.take()
        _signals[loop] = signals
    signals.ends.append(end)
    try:
        yield
    finally:
        signals.ends.remove(end)
        if not signals.ends:
            del _signals[loop]
            signals.give_back()


def _is_of_a_loop(handler: Any) -> bool:
    """Whether it stands for a loop's ``add_signal_handler``. `asyncio.run` has one of another kind for Ctrl-C."""
    return str(getattr(handler, "__module__", "")).split(".")[0] in ("asyncio", "uvloop")
