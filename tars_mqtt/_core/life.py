"""The life of a client: who may start, leave and stop it, and when."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Protocol

import attrs

from tars_mqtt._core.backlog import Backlog
from tars_mqtt._core.deadline import Deadlines
from tars_mqtt._core.dispatch import Dispatcher
from tars_mqtt._core.outbound import Outbound
from tars_mqtt._core.session import Session
from tars_mqtt._core.shutdown import Shutdown
from tars_mqtt._core.state import TRYING, ConnectionState, StateCell
from tars_mqtt._core.timeout import FOREVER
from tars_mqtt.config import MQTTClientConfig
from tars_mqtt.errors import (
    ClosedError,
    ConnectError,
    NotConnectedError,
    SubscribeError,
    TarsMQTTError,
    fresh,
)
from tars_mqtt.message import PublishReceipt

logger = logging.getLogger("tars_mqtt.session")

_MOMENT = 0.5
"""Seconds within which a shutdown ends when its time is up."""


class Herald(Protocol):
    """Tells the world that a service is there, and that it goes."""

    def start(self) -> None:
        """A life begins: there may be greetings again."""

    def goodbye(self, event: str) -> PublishReceipt | None:
        """Publish that the service goes; None where nobody is to be told."""


@attrs.frozen(eq=False)
class Attempt:
    """What a `connect` waits for."""

    first: Future[None]
    """Whether the first connection came about."""
    starts: bool
    """Whether to wait for *first*. Otherwise it came earlier, and the state is waited for to leave `TRYING`."""
    life: int
    """Which of `Life.lives` it belongs to."""

    def check(self) -> None:
        """Where it *starts* nothing: raise what ended the client meanwhile. Refused subscriptions others were told."""
        error = self.first.exception(0)
        if error is not None and not isinstance(error, SubscribeError):
            raise error


@attrs.frozen(eq=False)
class HandlerShutdown:
    """A shutdown that a handler has asked for."""

    life: int
    """Which of `Life.lives` it is for."""
    deadlines: Deadlines
    over: threading.Event = attrs.field(factory=threading.Event)

    def hurry(self, life: int, timeout: float | None) -> bool:
        """Have it do for another handler, which has so many seconds; False where it is over, or for another life."""
        if self.over.is_set() or life != self.life:
            return False
        self.deadlines.add(FOREVER if timeout is None else timeout)
        return True


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
        herald: Herald,
        prepare: Callable[[], None],
        retire: Callable[[], None],
    ) -> None:
        self._config = config
        self._state = state
        self._session = session
        self._dispatcher = dispatcher
        self._backlog = backlog
        self._herald = herald
        self._prepare = prepare
        self._steps = Shutdown(
            config, session, dispatcher, backlog, outbound, lambda: self._say_goodbye("shutdown"), retire
        )
        backlog.refuse(_not_started())
        self.forked = False
        """Whether this is the child of a fork, and the client its parent's."""
        self._called_off = False
        self.latest_end = object()
        """Another one since the latest call for a shutdown: whoever began to connect before is overtaken."""
        self._attempts: set[Attempt] = set()  # that are waited for; each step on it is atomic
        self._has_come: Future[None] | None = None
        """`Attempt.first` of the latest start whose connection some caller has."""
        # Guarded by _lock:
        self._lock = threading.Lock()
        self._first: Future[None] | None = None
        self._shutting_down = threading.Lock()
        self.deadlines = Deadlines()  # of those who shut down, or wait for it; others in each life
        self._ending = False
        self._aside: HandlerShutdown | None = None
        self.lives = 0
        """How many have begun: from the first start, or the first after a shutdown, to the next shutdown."""

    def check(self) -> None:
        """Refuse to work in a forked child, which has neither the threads nor the connection."""
        if self.forked:
            raise ClosedError(
                "this client belongs to the parent of this forked process: make a new one after os.fork()"
            )

    def connect(self, timeout: float | None) -> int:
        """Start if needed and wait until the connection is up and the subscriptions acknowledged.

        Returns:
            Which of the `lives` it is in, where another may have followed by now.
        """
        timeout = FOREVER if timeout is None else timeout
        deadline = time.monotonic() + timeout
        attempt = self.begin(timeout)
        try:
            if attempt.starts:
                attempt.first.result(_until(deadline))
            else:  # the first connection was there, even if it is gone by now
                attempt.check()
                self._await_connection(deadline)
        except BaseException as error:
            told = self.failed(attempt, timeout, error)
            raise told from told.__cause__
        else:
            self.came_about(attempt)
            return attempt.life
        finally:
            self.over(attempt)

    def _await_connection(self, deadline: float) -> None:
        """Wait for the connection of a client that had one already, and is about to get the next."""
        if not self._state.wait(lambda state: state not in TRYING, _until(deadline)):
            raise TimeoutError
        self.check_not_left()

    def check_not_left(self) -> None:
        """Refuse to take for a connection what is none, and will be none by itself."""
        if self._state.value in (
            ConnectionState.DISCONNECTED,
            ConnectionState.CLOSING,
            ConnectionState.CLOSED,
        ):
            raise ClosedError("the client left the broker while it connected")

    # The parts of `connect`, for callers that wait in another way: `begin`, then `came_about` or `failed`, and `over`.

    def begin(self, timeout: float | None, latest_end: object = None) -> Attempt:
        """Start if needed; what is to be waited for then is in the attempt.

        Args:
            timeout: Seconds to wait for others that start or stop.
            latest_end: That of the moment from which the caller wants to connect; now, unless given.
        """
        self.check()
        latest_end = latest_end or self.latest_end  # before the wait for others, one of which may shut down
        deadline = time.monotonic() + (FOREVER if timeout is None else timeout)
        if not self._lock.acquire(timeout=_until(deadline)):
            raise _still_leaving()
        try:
            attempt, started = self._begin(deadline, latest_end)
            overtaken = latest_end is not self.latest_end
            if overtaken and started:
                self._session.thread.interrupt()  # under the lock: nobody joins what is about to end
        finally:
            self._lock.release()
        if overtaken:
            if started:  # otherwise the shutdown sees to what there was
                self._finish_overtaken(attempt)
            self.over(attempt)
            raise _overtaken()
        if self._called_off:
            self.call_off()  # a signal came before there was anything to interrupt
        return attempt

    def _begin(self, deadline: float, latest_end: object) -> tuple[Attempt, bool]:
        """Start if needed; returns whether it was, too. Holds the lock."""
        if self._ending and self._state.value is not ConnectionState.CLOSED:
            raise ClosedError("the client is being shut down: call connect() when that is over")
        if latest_end is not self.latest_end:
            raise _overtaken()
        if self._session.thread.leaving and not self._session.thread.leave(_until(deadline)):
            raise _still_leaving()
        # Asked before the thread starts: its first connection may come and go before this one looks.
        starts = not self._session.thread.running or self._first is None or not self._first.done()
        started = not self._session.thread.running
        if started:
            self._start(deadline)
        assert self._first is not None
        attempt = Attempt(self._first, starts, self.lives)
        self._attempts.add(attempt)
        return attempt, started

    def _finish_overtaken(self, attempt: Attempt) -> None:
        """A shutdown has not seen what was started here: shut that down, too, unless others have started anew."""
        with self._shutting_down:
            with self._lock:
                alone = self._first is attempt.first
            if alone:
                with self.within(self._config.shutdown_timeout):
                    self._dispatcher.leave_iterators(threading.current_thread())
                    self._shutdown()

    def _start(self, wanted_by: float) -> None:
        """Holds the lock."""
        if self._state.value in (ConnectionState.NEW, ConnectionState.CLOSED):
            self.lives += 1
        self._prepare()
        try:
            self._state.set(ConnectionState.CONNECTING)
            self._herald.start()
            self._dispatcher.start()
            self._backlog.open()
            self._session.inbound.open()
            self._first = self._session.start(wanted_by)
        except BaseException as error:
            self._session.thread.interrupt()  # Ctrl-C may come when it has just started
            self._backlog.refuse(_not_started())
            self._state.set(ConnectionState.DISCONNECTED)
            if isinstance(error, (OSError, RuntimeError)):  # no more open files, or no more threads
                raise ConnectError(
                    f"the client cannot start: {error}; check what the process may use"
                ) from error
            raise

    def came_about(self, attempt: Attempt) -> None:
        """The caller has the connection that it waited for: nobody else may take it away by giving up."""
        self._has_come = attempt.first

    def over(self, attempt: Attempt) -> None:
        """Nobody waits for it any more."""
        self._attempts.discard(attempt)

    def failed(self, attempt: Attempt, timeout: float | None, error: BaseException) -> BaseException:
        """The caller waits no longer, because of *error*; stops what nobody else waits for.

        Returns:
            What to raise in its place, with the cause that it has.
        """
        if isinstance(error, TimeoutError):
            return self._timed_out(attempt, timeout or 0.0)
        if isinstance(error, SubscribeError):
            self.came_about(attempt)
            return fresh(error)
        if isinstance(error, TarsMQTTError):
            if attempt.starts:  # there will be no connection: leave nothing running
                self.stop_network(0.0, attempt.first)
            return fresh(error)
        self.give_up(attempt)  # it was cancelled; Ctrl-C, as a rule, where there is no loop
        return error

    def _timed_out(self, attempt: Attempt, timeout: float) -> ConnectError:
        reason = self._session.last_error
        stopped = self.give_up(attempt)
        return ConnectError(
            f"no connection to {' or '.join(map(str, self._config.urls))} within {timeout:g} s"
            + (f": {reason}" if reason else "")
            + "; check mqtt_url, and whether a broker runs there"
            + ("" if stopped else ". The client keeps trying")
        )

    def give_up(self, attempt: Attempt) -> bool:
        """The caller waits no longer. Stops what nobody else waits for; True if nothing runs then."""
        self.over(attempt)
        if not attempt.starts:
            return False
        with self._lock:
            if self._has_come is attempt.first or any(
                other.first is attempt.first for other in tuple(self._attempts)
            ):
                return False
            self._stop_network(0.0, attempt.first)
            return True

    def call_off(self) -> None:
        """Have a `connect` that waits, or is about to, end with `ClosedError`. For signal handlers too."""
        self._called_off = True
        # Where nobody waits, the shutdown goes on trying: what is queued goes out if the broker comes back in time.
        if self._attempts:
            self._session.thread.interrupt()

    def forget_signals(self) -> None:
        """No signal handler will `call_off` any more: the next `connect` is another matter."""
        self._called_off = False

    def stop_network(self, timeout: float, first: Future[None] | None) -> bool:
        """End the network thread; what is queued stays queued. False when it does not end in time.

        Where a shutdown is under way, that is left to it: it may still bring out what is queued.

        Args:
            first: Only the one that promised this; another may have been started since.
        """
        with self._lock:  # no `connect` between the end and what is said of it
            return self._stop_network(timeout, first)

    def _stop_network(self, timeout: float, first: Future[None] | None) -> bool:
        """Holds the lock."""
        if self._ending or first is not self._first:
            return True
        if not self._closing:
            self._backlog.refuse(_not_started())  # first: what is queued leaves, and no more comes
        ended = self._session.thread.leave(timeout)
        if not self._closing:
            self._state.set(ConnectionState.DISCONNECTED)
        return ended

    @property
    def _closing(self) -> bool:
        return self._state.value in (ConnectionState.CLOSING, ConnectionState.CLOSED)

    def disconnect(self) -> None:
        """Leave the broker; subscriptions stay registered, unsent messages of QoS 1 and 2 queued."""
        self.check()
        # Of this life: while the goodbye is waited for, others may end it, and begin the next.
        first = self._first
        if self._ending or not self._session.thread.running:
            return
        deadline = time.monotonic() + self._config.shutdown_timeout
        goodbye = self._say_goodbye("disconnected")
        if goodbye is not None:
            goodbye._wait(_until(deadline))
        if not self.stop_network(_until(deadline), first):
            logger.warning(
                "disconnect: the network thread is stuck in the operating system", extra=self._extra()
            )

    def _say_goodbye(self, event: str) -> PublishReceipt | None:
        if self._state.value in (ConnectionState.CONNECTED, ConnectionState.CLOSING) and self._backlog.online:
            return self._herald.goodbye(event)
        return None

    def asked_to_end(self) -> int:
        """A shutdown is called for: who connects meanwhile is overtaken. Returns which of the `lives` it is for."""
        self.latest_end = object()
        return (
            self.lives
        )  # behind that: what has begun to connect is of this life, or finds that it was overtaken

    def shutdown(self, timeout: float | None, reader: object, life: int | None = None) -> None:
        """Finish the work, flush, say goodbye, join every thread. Not in a handler, which it would wait for.

        Where another one is under way, that has no more time than this one from now on.

        Args:
            reader: The thread or task that waits: what its own iterators hold is not waited for.
            life: What `asked_to_end` returned, where it was asked for earlier; no later one is shut down.
        """
        self.check()
        life = self.asked_to_end() if life is None else life
        self._dispatcher.leave_iterators(reader)
        with self.within(timeout):
            if not self._shutting_down.acquire(timeout=(FOREVER if timeout is None else timeout) + _MOMENT):
                logger.warning("shutdown: another one is still under way", extra=self._extra())
                return
            try:
                if self._state.value is ConnectionState.CLOSED:
                    self._called_off = False
                elif self.lives == life:
                    self._shutdown()
                # Otherwise another one has done it meanwhile, and somebody has connected since.
            except BaseException:  # Ctrl-C, as a rule
                self._called_off = False
                raise
            finally:
                self._shutting_down.release()

    def within(self, timeout: float | None) -> AbstractContextManager[None]:
        """A shutdown, be it under way or about to begin, has so many seconds."""
        return self.deadlines.within(FOREVER if timeout is None else timeout)

    def shutdown_aside(self, timeout: float | None) -> None:
        """Have a thread of its own shut down.

        For handlers: they return, and what they had in work is finished, and acknowledged, as all other work is.
        """
        self.check()
        life, aside = self.asked_to_end(), self._aside
        if aside is not None and aside.hurry(life, timeout):
            return
        aside = HandlerShutdown(life, self.deadlines)

        def run() -> None:
            try:
                self.shutdown(timeout, None, aside.life)
            finally:
                aside.over.set()

        name = f"tars-mqtt/{self._config.client_id}/shutdown"
        # No daemon, as the handler's thread is: a process that is at its end waits for an end in good order.
        threading.Thread(target=run, name=name, daemon=False).start()
        self._aside = aside

    def await_aside(self, hurried: Callable[[], bool]) -> None:
        """Wait for the shutdown that a handler has asked for, if one has, for the time that it was given.

        Args:
            hurried: Asked often; True ends the wait.
        """
        self._dispatcher.leave_iterators(threading.current_thread())  # which waits, and reads them no more
        # Not by joining the thread: where Ctrl-C comes in between, Python 3.11 takes it for dead, and leaves it behind.
        while (aside := self._aside) is not None and not aside.over.wait(0.1) and not hurried():
            pass

    def _shutdown(self) -> None:
        self._ending = True
        try:
            self._end()
        finally:
            self._ending = False

    def _end(self) -> None:
        deadlines = self.deadlines
        # A `connect` that is about to begin has begun by then, is refused, or finds that it was overtaken.
        if not deadlines.wait(self._begin_to_close):
            self.latest_end = object()
            self._state.set(ConnectionState.CLOSING)
        self._steps.run(deadlines)
        self._called_off = False
        self.deadlines = Deadlines()
        self._ending = False
        self._state.set(ConnectionState.CLOSED)  # from here on there may be another life

    def _begin_to_close(self, timeout: float) -> bool:
        """Wait until nobody starts or stops; False when the time was up first."""
        if not self._lock.acquire(timeout=timeout):
            return False
        try:
            self._state.set(ConnectionState.CLOSING)
        finally:
            self._lock.release()
        return True

    def _extra(self) -> dict[str, object]:
        return {"client_id": self._config.client_id}


def _until(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _still_leaving() -> ConnectError:
    return ConnectError("the client is still busy leaving the broker; call connect() again")


def _overtaken() -> ClosedError:
    return ClosedError("the client was shut down while it connected")


def _not_started() -> NotConnectedError:
    return NotConnectedError("the client is not connected: call connect() first")
