"""Calling what may block, a user's function above all, beside the network thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from tars_mqtt._core.limit import Limit
from tars_mqtt._core.transport import Transport

T = TypeVar("T")

Start = Callable[[Callable[[], Any], str], "Future[Any]"]
"""Starts a call elsewhere, under a name, and gives its outcome."""


class CallFailedError(Exception):
    """A call raised, or did not return in time; the message says which, and quotes nothing of the user's."""


class Aside:
    """Has calls made elsewhere, while the network thread waits for no longer than it wants to.

    Owned by the network thread. A call that does not return in time goes on, for Python cannot end
    a thread; it is waited for the next time, so that there is never more than one of each.
    """

    def __init__(self, transport: Transport, client_id: str, start: Start | None = None) -> None:
        self._transport = transport
        self._client_id = client_id
        self._start = start or on_a_thread
        self._unfinished: dict[str, Future[Any]] = {}

    def call(self, role: str, function: Callable[[], T], limit: Limit) -> T:
        """Return what *function* returns.

        Args:
            role: Says what the call is for; part of the thread's name.
            function: What to call.
            limit: Asked whether it is called off whenever the network thread is woken.

        Raises:
            CallFailedError: It raised, or did not return in time.
            Interrupted: The attempt was called off.
        """
        started = time.monotonic()
        outcome: Future[T] | None = self._unfinished.pop(role, None)
        if outcome is None or outcome.done():  # what came after its time may be out of date
            try:
                outcome = self._start(function, f"tars-mqtt/{self._client_id}/{role}")
            except RuntimeError as error:  # no more threads, or the event loop is closed
                raise CallFailedError(f"could not be called: {error}") from error
            outcome.add_done_callback(lambda _: self._transport.wake())
        try:
            while True:
                self._transport.acknowledge_wake()
                if outcome.done():
                    return _result(outcome)
                remaining = limit.left()
                if remaining <= 0:
                    raise CallFailedError(f"did not return within {limit.deadline - started:.3g} s")
                self._transport.sleep(remaining)
        finally:
            if not outcome.cancel() and not outcome.done():
                self._unfinished[role] = outcome


def _result(outcome: Future[T]) -> T:
    try:
        return outcome.result()
    except (Exception, CancelledError, SystemExit, KeyboardInterrupt) as error:
        # Its message may quote a token, or a URL that carries one.
        raise CallFailedError(f"failed: {type(error).__name__}") from error


def on_a_thread(function: Callable[[], T], name: str) -> Future[T]:
    """Call *function* on a thread of its own."""
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = function()
        except BaseException as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return outcome
