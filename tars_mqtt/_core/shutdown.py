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

_OWING_PAUSE = 0.01
"""Seconds between two questions to the broker while acknowledgements are owed to it."""


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
            self._leave_groups(deadlines)
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

    def _leave_groups(self, deadlines: Deadlines) -> None:
        """Take no more from shared subscriptions, and handle what the broker has sent, or still sends, for them."""
        inbound, thread, handled = self._session.inbound, self._session.thread, -1
        # Each acknowledgement may bring one more of those that the broker has set aside for us. Its answer to an
        # UNSUBSCRIBE behind the last of them says that there was none.
        while departure := self._session.leave_groups():
            if not deadlines.wait(lambda seconds: departure.wait(seconds) or not thread.running, 2):
                break
            if not thread.running or (inbound.taken == handled and not departure.owing):
                break
            handled = inbound.taken
            if not self._await_handlers(deadlines):
                break
            if departure.owing:  # a dead letter is on its way, or a PUBREL
                time.sleep(_OWING_PAUSE)

    def _leave_broker(self, deadlines: Deadlines) -> None:
        """Flush, say goodbye, and end the network thread."""
        thread = self._session.thread
        # A refusal of the broker may end the thread: then nothing leaves any more.
        deadlines.wait(lambda seconds: self._backlog.wait_flushed(seconds) or not thread.running, 2)
        goodbye = self._say_goodbye()
        if goodbye is not None:
            deadlines.wait(lambda seconds: acknowledged(goodbye, seconds), 1)
        if not (deadlines.wait(lambda seconds: thread.leave(deadlines.left(), seconds)) or thread.leave(0.0)):
            logger.warning("shutdown: the network thread is stuck in the operating system", extra=self._extra)


def acknowledged(receipt: PublishReceipt, timeout: float) -> bool:
    """Wait until it is known what became of a message; False when the time was up first."""
    return receipt.done() or receipt._wait(timeout)
