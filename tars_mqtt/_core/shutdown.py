"""What a shutdown does, step by step. When there is one, and who else may start or stop meanwhile, is for `life`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from tars_mqtt._core.backlog import Backlog
from tars_mqtt._core.deadline import Deadlines
from tars_mqtt._core.dispatch import Dispatcher
from tars_mqtt._core.outbound import Outbound
from tars_mqtt._core.session import Session
from tars_mqtt.config import MQTTClientConfig
from tars_mqtt.errors import ClosedError
from tars_mqtt.message import PublishReceipt

logger = logging.getLogger("tars_mqtt.session")

_LOOK = 0.01
"""Seconds between two looks at what is owed to the broker."""

_OWING_TIME = 1.0
"""Seconds for which something may be owed while nobody is at work on it."""


class Shutdown:
    """Finishes the work, flushes, says goodbye, and ends every thread, each within what is left of the time.

    Args:
        say_goodbye: Publishes the last words; None where nobody is to be told.
        retire: Called at the end, for what ends with this life.
    """

    def __init__(
        self,
        config: MQTTClientConfig,
        session: Session,
        dispatcher: Dispatcher,
        backlog: Backlog,
        outbound: Outbound,
        say_goodbye: Callable[[], PublishReceipt | None],
        retire: Callable[[], None],
    ) -> None:
        self._session = session
        self._dispatcher = dispatcher
        self._backlog = backlog
        self._outbound = outbound
        self._say_goodbye = say_goodbye
        self._retire = retire
        self._drain_shared = config.drain_shared
        self._extra = {"client_id": config.client_id}

    def run(self, deadlines: Deadlines) -> None:
        """Go through all steps. Blocks; one at a time."""
        if self._drain_shared and self._session.thread.running:
            self._leave_shared(deadlines)
        self._session.inbound.close()
        if not self._await_handlers(deadlines):
            logger.warning("shutdown: handlers still run; going on without them", extra=self._extra)
        self._backlog.refuse(ClosedError("the client was shut down: call connect() to use it again"))
        if self._session.thread.running:
            self._leave_broker(deadlines)
        try:
            lost = self._outbound.abandon()
            if lost:
                logger.warning(
                    "shutdown: the broker did not acknowledge %d messages in time", lost, extra=self._extra
                )
            for name in self._dispatcher.stop(deadlines.left()):
                logger.warning("shutdown: what runs on %s does not end", name, extra=self._extra)
        finally:
            self._backlog.close_outbox()  # only now: a handler that has ended in time is remembered there
        self._retire()
        logger.info("shut down", extra=self._extra)

    def _await_handlers(self, deadlines: Deadlines) -> bool:
        dispatcher = self._dispatcher
        return deadlines.wait(lambda seconds: dispatcher.wait_idle(seconds) or dispatcher.deserted, 2)

    def _leave_shared(self, deadlines: Deadlines) -> None:
        """Take no more jobs, and finish what the broker has set aside for us, or still sends for each that is done."""
        session, thread = self._session, self._session.thread
        while departure := session.leave_shared():
            if not deadlines.wait(lambda seconds: departure.wait(seconds) or not thread.running, 2):
                return
            if not thread.running:
                return
            if not departure.answered:  # there is no connection
                time.sleep(_LOOK)
                if not deadlines.left(2):
                    return
            elif any(departure.owed):
                if not self._settle_with_groups(deadlines):
                    return
            elif departure.arrived == session.inbound.shared_arrived:
                return  # the answer came behind the last acknowledgement, and nothing in between

    def _settle_with_groups(self, deadlines: Deadlines) -> bool:
        """Wait until nothing is owed to the groups, or the connection is gone; False when that is in vain."""
        busy = time.monotonic()
        while left := deadlines.left(2):
            try:
                owed = self._session.owed_to_groups().result(min(left, _OWING_TIME))
            except TimeoutError:
                return False  # the network thread is at its end, or stuck
            if owed is None or not any(owed):
                return True
            now = time.monotonic()
            # The handlers, a dead letter on its way, or the broker with a release.
            if owed.unreleased or not (self._dispatcher.wait_idle(0.0) and self._backlog.wait_flushed(0.0)):
                busy = now
            elif now - busy > _OWING_TIME:
                return False  # an iterator that nobody reads, for instance
            time.sleep(_LOOK)
        return False

    def _leave_broker(self, deadlines: Deadlines) -> None:
        """Flush, say goodbye, and end the network thread."""
        thread = self._session.thread
        # A refusal of the broker may end the thread: then nothing leaves any more.
        deadlines.wait(lambda seconds: self._backlog.wait_flushed(seconds) or not thread.running, 2)
        goodbye = self._say_goodbye()
        if goodbye is not None:
            deadlines.wait(goodbye._wait, 1)
        if not (deadlines.wait(lambda seconds: thread.leave(deadlines.left(), seconds)) or thread.leave(0.0)):
            logger.warning("shutdown: the network thread is stuck in the operating system", extra=self._extra)
