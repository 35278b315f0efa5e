"""Health, heartbeat and last will: what others learn of this service without asking."""

from __future__ import annotations

import contextlib
import logging
import math
import time

from tars_mqtt._core.backlog import Backlog
from tars_mqtt._core.event import Will
from tars_mqtt._core.outgoing import Outgoing
from tars_mqtt.config import MQTTClientConfig
from tars_mqtt.envelope import encode_event
from tars_mqtt.errors import ClosedError, TarsMQTTError
from tars_mqtt.message import PublishReceipt
from tars_mqtt.payload import (
    HEALTH_TYPE,
    HEARTBEAT_TYPE,
    HealthPayload,
    HeartbeatPayload,
    health_topic,
    heartbeat_topic,
)

logger = logging.getLogger("tars_mqtt.health")

_OVERTAKEN = 1.0
"""Seconds after `ready` until the state is repeated, where an old goodbye may have been sent behind it."""


class Health:
    """Publishes the retained health status and the heartbeat of one client.

    `will`, `ready` and `tick` run on the network thread and do not block, the rest on any thread.
    """

    def __init__(self, config: MQTTClientConfig, backlog: Backlog) -> None:
        self._config = config
        self._backlog = backlog
        self._health_topic = health_topic(config.source_name)
        self._heartbeat_topic = heartbeat_topic(config.source_name)
        self._warned = False
        self._state: HealthPayload | None = None
        """What was said last."""
        self._own: HealthPayload | None = None
        """What the service itself said last."""
        self._own_receipt: PublishReceipt | None = None
        self._announced: list[PublishReceipt] = []
        """The receipts of what `ready` published; the goodbye takes back what of it is unsent."""
        self._left = False
        """Whether the goodbye has been said."""
        self._farewell: PublishReceipt | None = None
        """Of the last goodbye."""
        # Owned by the network thread:
        self._next_heartbeat = math.inf
        self._repeat_at = math.inf

    # -- network thread ---------------------------------------------------------------------

    def will(self) -> Will | None:
        """The last will: a killed process is seen as unhealthy once its keepalive has run out."""
        if not self._config.enable_health:
            return None
        _, payload = self._encode(HEALTH_TYPE, HealthPayload(ok=False, event="connection_lost").to_data())
        return Will(self._health_topic, payload, qos=1, retain=True)

    def ready(self, first: bool) -> None:
        """Publish that the service is up."""
        now = time.monotonic()
        if self._config.enable_health:
            state = HealthPayload(ok=True, event="ready" if first else "reconnected")
            complaint = self._complaint()
            # Each goes ahead of all that waits, so the last word is queued first.
            states = [state] if complaint is None else [complaint, state]
            # Otherwise one of an earlier connection is still on its way.
            if all(receipt.done() for receipt in self._announced):
                self._announced.clear()
                for each in states:
                    self._publish(each, greets=True)
            waits = self._own_receipt is not None and not self._own_receipt.done()
            self._state = self._own if waits else states[0]
            # By then the broker has given up any older connection of ours, whose will says we are dead.
            self._repeat_at = math.inf if first else now + 1.5 * self._config.keepalive
            if self._farewell is not None and not self._farewell.done():
                self._repeat_at = now + _OVERTAKEN
            self._farewell = None
        if self._config.enable_heartbeat:
            self._next_heartbeat = now + self._config.heartbeat_interval

    def tick(self, now: float) -> float:
        """Publish what is due; returns when something is due next."""
        if now >= self._next_heartbeat:
            self._beat()
            # Counted from now: after a pause there is one heartbeat, not one for each that was missed.
            self._next_heartbeat = now + self._config.heartbeat_interval
        if now >= self._repeat_at:
            self._repeat_at = math.inf
            if self._state is not None:
                self._publish(self._state.at(time.time()))
        return min(self._next_heartbeat, self._repeat_at)

    def _beat(self) -> None:
        _, payload = self._encode(HEARTBEAT_TYPE, HeartbeatPayload().to_data())
        # One that cannot go out now is missed, as it should be.
        with contextlib.suppress(TarsMQTTError):
            self._backlog.admit_lossy(self._heartbeat_topic.encode(), payload, False, 0.0)

    # -- any thread -------------------------------------------------------------------------

    def publish(
        self, ok: bool, event: str | None, error: str | None, timeout: float
    ) -> PublishReceipt | None:
        """Publish the state that the service gives itself; None without ``enable_health``.

        Args:
            timeout: Seconds to wait for room in the queue.
        """
        if not self._config.enable_health:
            if not self._warned:
                self._warned = True
                logger.warning(
                    "publish_health does nothing: enable_health is off",
                    extra={"client_id": self._config.client_id},
                )
            return None
        state = HealthPayload(ok=ok, event=event, error=error)
        receipt = self._publish(state, timeout)
        self._own, self._own_receipt = state, receipt
        return receipt

    def start(self) -> None:
        """A life begins: there may be greetings again."""
        self._left = False
        if self._farewell is not None:
            self._farewell.cancel()

    def handler_stuck(self, topic: str) -> None:
        """Publish that a handler does not return; not where there is no room."""
        error = f"the handler of {topic} does not return"
        self._publish_if_room(HealthPayload(ok=False, event="handler_timeout", error=error))

    def handlers_returned(self) -> None:
        """Publish that the last such handler has returned; not where there is no room."""
        self._publish_if_room(self._complaint() or HealthPayload(ok=True, event="handler_returned"))

    def goodbye(self, event: str) -> PublishReceipt | None:
        """Publish that the service leaves on purpose."""
        if not self._config.enable_health:
            return None
        if event == "shutdown":
            self._own = None
        # A greeting that has not left yet would come after this, and stay; one that is about to be queued as well.
        self._left = True
        for receipt in tuple(self._announced):
            receipt.cancel()
        if self._own_receipt is not None:  # nor may what the service says of itself
            self._own_receipt._withdraw(ClosedError("the client left before its health was published"))
        self._farewell = self._publish(HealthPayload(ok=False, event=event))
        return self._farewell

    # -- inside -----------------------------------------------------------------------------

    def _complaint(self) -> HealthPayload | None:
        """What the service itself says is wrong, if anything is: our own findings do not stand over that."""
        own = self._own
        return None if own is None or own.ok else own.at(time.time())

    def _publish_if_room(self, state: HealthPayload) -> None:
        if self._config.enable_health:
            with contextlib.suppress(TarsMQTTError):
                self._publish(state, timeout=0.0)

    def _publish(
        self,
        state: HealthPayload,
        timeout: float | None = None,
        greets: bool = False,
    ) -> PublishReceipt:
        """Queue a state; without a timeout ahead of everything else, room or not."""
        envelope_id, payload = self._encode(HEALTH_TYPE, state.to_data())
        receipt = PublishReceipt(envelope_id, self._health_topic, 1)
        message = Outgoing(self._health_topic.encode(), payload, 1, True, receipt)
        if greets:
            self._announced.append(receipt)
            # First entered, then looked; `goodbye` sets it first, and then looks: one of the two takes it back.
            if self._left:
                receipt.cancel()
        if timeout is None:
            self._backlog.admit_first(message)
        else:
            self._backlog.admit(message, timeout, durable=False)
        self._state = state
        return receipt

    def _encode(self, event_type: str, data: dict[str, object]) -> tuple[str, bytes]:
        return encode_event(event_type, data, self._config.source_name, None, "field")
