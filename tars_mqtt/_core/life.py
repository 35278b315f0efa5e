"""The life of a client: starting, leaving and stopping, in the right order."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Protocol

from tars_mqtt._core.backlog import Backlog
from tars_mqtt._core.dispatch import Dispatcher
from tars_mqtt._core.outbound import Outbound
from tars_mqtt._core.session import Session
from tars_mqtt._core.state import ConnectionState, StateCell
from tars_mqtt.config import MQTTClientConfig
from tars_mqtt.errors import (
    ClosedError,
    ConnectError,
    NotConnectedError,
    SubscribeError,
    TarsMQTTError,
)
from tars_mqtt.message import PublishReceipt

logger = logging.getLogger("tars_mqtt.session")

_GOODBYE_SHARE = 0.1
"""Of the time for a shutdown: kept for the goodbye, whatever came before took."""


class Farewell(Protocol):
    """What the world is told at the end."""

    def goodbye(self, event: str) -> PublishReceipt | None:
        """Publish that the service goes; None where nobody is to be told."""


class Life:
    """`connect`, `disconnect` and `shutdown`, which block. Any thread.

    Args:
        prepare: Called before each start, when nothing runs yet.
        retire: Called at the end of a shutdown, for what ends with this life.
    """

    def __init__(
        self,
        config: MQTTClientConfig,
        state: StateCell,
        session: Session,
        dispatcher: Dispatcher,
        backlog: Backlog,
        outbound: Outbound,
        farewell: Farewell,
        prepare: Callable[[], None],
        retire: Callable[[], None],
    ) -> None:
        self._config = config
        self._state = state
        self._session = session
        self._dispatcher = dispatcher
        self._backlog = backlog
        self._outbound = outbound
        self._farewell = farewell
        self._prepare = prepare
        self._retire = retire
        backlog.refuse(_not_started())
        self.forked = False
        """Whether this is the child of a fork, and the client its parent's."""
        self._called_off = False
        # Guarded by _lock:
        self._lock = threading.Lock()
        self._first: Future[None] | None = None
        self._shutting_down = threading.Lock()

    def check(self) -> None:
        """Refuse to work in a forked child, which has neither the threads nor the connection."""
        if self.forked:
            raise ClosedError(
                "this client belongs to the parent of this forked process: make a new one after os.fork()"
            )

    def connect(self, timeout: float | None) -> None:
        """Start if needed and wait until the connection is up and the subscriptions acknowledged."""
        self.check()
        deadline = time.monotonic() + (threading.TIMEOUT_MAX / 2 if timeout is None else timeout)
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise ConnectError("the client is still busy leaving the broker; call connect() again")
        try:
            if self._shutting_down.locked():
                raise ClosedError("the client is being shut down: call connect() when that is over")
            # Asked before the thread starts: its first connection may come and go before this one looks.
            began = not self._session.running or self._first is None or not self._first.done()
            if not self._session.running:
                self._prepare()
                self._state.set(ConnectionState.CONNECTING)
                self._dispatcher.start()
                self._backlog.open()
                self._session.inbound.open()
                self._first = self._session.start()
            first = self._first
        finally:
            self._lock.release()
        assert first is not None
        if self._called_off and not first.done():
            self._session.interrupt()  # a signal came before there was anything to interrupt
        try:
            first.result(timeout)
            if not began:  # the first connection was there, even if it is gone by now
                self._await_connection(deadline)
        except FutureTimeoutError:
            reason = self._session.last_error
            if began:
                self.stop_network(0.0, first)
            raise ConnectError(
                f"no connection to {self._config.urls[0]} within {timeout:g} s"
                + (f": {reason}" if reason else "")
                + "; check mqtt_url, and whether a broker runs there"
                + ("" if began else ". The client keeps trying")
            ) from None
        except SubscribeError as error:
            raise SubscribeError(str(error), error.refused) from error
        except TarsMQTTError:
            self.stop_network(0.0, first)
            raise

    def _await_connection(self, deadline: float) -> None:
        """Wait for the connection of a client that had one already, and is about to get the next."""
        trying = (ConnectionState.CONNECTING, ConnectionState.RECONNECTING)
        left = max(0.0, deadline - time.monotonic())
        if not self._state.wait(lambda state: state not in trying, min(left, threading.TIMEOUT_MAX)):
            raise FutureTimeoutError
        if self._state.value is not ConnectionState.CONNECTED:
            raise ClosedError("the client left the broker while it connected")

    def call_off(self) -> None:
        """Have a `connect` that waits, or is about to, end with `ClosedError`. For signal handlers too."""
        self._called_off = True
        if self._first is not None and not self._first.done():
            self._session.interrupt()

    def stop_network(self, timeout: float, first: Future[None] | None = None) -> bool:
        """End the network thread; what is queued stays queued. False when it does not end in time.

        Args:
            first: Only the one that promised this; another may have been started since.
        """
        with self._lock:  # no `connect` between the end and what is said of it
            if first is not None and first is not self._first:
                return True
            if not self._closing:
                self._backlog.refuse(_not_started())  # first: what is queued leaves, and no more comes
            ended = self._session.leave(timeout)
            if not self._closing:
                self._state.set(ConnectionState.DISCONNECTED)
            return ended

    @property
    def _closing(self) -> bool:
        return self._state.value in (ConnectionState.CLOSING, ConnectionState.CLOSED)

    def disconnect(self) -> None:
        """Leave the broker; subscriptions stay registered, unsent messages of QoS 1 and 2 queued."""
        self.check()
        if not self._session.running:
            return
        deadline = time.monotonic() + self._config.shutdown_timeout
        self._say_goodbye("disconnected", deadline)
        self.stop_network(max(0.0, deadline - time.monotonic()))

    def _say_goodbye(self, event: str, deadline: float) -> None:
        if self._state.value in (ConnectionState.CONNECTED, ConnectionState.CLOSING) and self._backlog.online:
            receipt = self._farewell.goodbye(event)
            if receipt is not None:
                with contextlib.suppress(TarsMQTTError):
                    receipt.result(max(0.0, deadline - time.monotonic()))

    def shutdown(self, timeout: float, own: int | None = None, reader: object = None) -> None:
        """Finish the work, flush, say goodbye, join every thread.

        Args:
            own: See `Dispatcher.own_work`; for a caller on another thread or task than the one that asked.
            reader: See `Dispatcher.wait_idle`; this thread unless given.
        """
        self.check()
        own = self._dispatcher.own_work() if own is None else own
        if own and self._shutting_down.locked():
            return  # whoever shuts down waits for this very handler
        if not self._shutting_down.acquire(timeout=timeout):
            return
        try:
            if self._state.value is not ConnectionState.CLOSED:
                reader = reader or threading.current_thread()
                self._shutdown(time.monotonic() + timeout, timeout * _GOODBYE_SHARE, own, reader)
        finally:
            self._called_off = False
            self._shutting_down.release()

    def _shutdown(self, deadline: float, reserve: float, own: int, reader: object) -> None:
        def left(kept: float = 0.0) -> float:
            return max(0.0, deadline - kept - time.monotonic())

        extra = {"client_id": self._config.client_id}
        # A `connect` that is about to begin has begun by then, or is refused.
        begun = self._lock.acquire(timeout=left())
        self._state.set(ConnectionState.CLOSING)
        if begun:
            self._lock.release()
        self._session.inbound.close()
        if not self._dispatcher.wait_idle(left(2 * reserve), own, reader):
            logger.warning("shutdown: handlers still run; going on without them", extra=extra)
        self._backlog.refuse(ClosedError("the client was shut down: call connect() to use it again"))
        if self._session.running:
            self._backlog.wait_flushed(left(2 * reserve))
            self._say_goodbye("shutdown", deadline - reserve)
            if not self._session.leave(left()):
                logger.warning("shutdown: the network thread is stuck in the operating system", extra=extra)
        lost = self._outbound.abandon()
        if lost:
            logger.warning("shutdown: the broker did not acknowledge %d messages in time", lost, extra=extra)
        for name in self._dispatcher.stop(left()):
            logger.warning("shutdown: the handler on thread %s does not return", name, extra=extra)
        self._retire()
        self._state.set(ConnectionState.CLOSED)
        logger.info("shut down", extra=extra)


def _not_started() -> NotConnectedError:
    return NotConnectedError("the client is not connected: call connect() first")
