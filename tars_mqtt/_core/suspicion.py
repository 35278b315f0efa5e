"""Finding the message that makes a broker close the connection."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable

from tars_mqtt._core.outgoing import Outgoing

_MOST_STRIKES = 4

_PROBATION = 0.2, 0.6
"""Seconds, at least and at most, that a connection must have held before the last tries on it: whatever
breaks connections as soon as they stand is not the message. Random, so that nothing keeps step with it."""

_AT_ONCE = 5.0
"""Seconds within which a broker hangs up over a message that it does not want: it has seen the length."""


class Suspicion:
    """Finds the message that ends each connection. Owned by the network thread.

    Brokers close the connection over a packet that is larger than they allow, and MQTT 3.1.1 has no way to
    say so. A bad network closes connections as well, and a message is not to be lost for that. So a message
    larger than any that was ever acknowledged is suspected when a connection ends, and then sent alone, on
    a connection that has just carried an answer, and at the last tries has held for a while. If the broker
    hangs up at once each time, it is that message.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._largest = 0
        self._alone: Outgoing | None = None
        self._sent_at = 0.0
        self._answered = False
        self._held = False
        self.wants_answer = False
        """Whether a suspect waits for a sign that the connection carries both ways."""
        self.look_again_at = math.inf
        """When a suspect that waits is worth another look, on the monotonic clock."""

    def new_connection(self) -> None:
        """Nothing is known of this connection yet."""
        self._alone = None
        self._answered = self._held = self.wants_answer = False
        self.look_again_at = math.inf

    def answered(self) -> None:
        """The broker answered something on this connection."""
        self._answered = True
        self.wants_answer = False

    def may_send(self, message: Outgoing, others_in_flight: bool) -> bool:
        """Whether *message* may go now: no suspect goes with others, nor on an untried connection."""
        if self._alone is not None:
            return False
        if not message.strikes or not self._suspects(message):
            return True
        if message.strikes > 1 and not self._has_held():
            return False
        if not self._answered:
            self.wants_answer = True
            return False
        return not others_in_flight

    def _has_held(self) -> bool:
        now = self._clock()
        if not self._held and self.look_again_at == math.inf:
            self.look_again_at = now + random.uniform(*_PROBATION)
        elif not self._held and now >= self.look_again_at:
            self._held = True
            self._answered = False  # what counts is that it carries now
            self.look_again_at = math.inf
        return self._held

    def sent(self, message: Outgoing) -> None:
        """Take note of a suspect on its way."""
        if self._suspects(message):
            self._alone = message
            self._sent_at = self._clock()

    def _suspects(self, message: Outgoing) -> bool:
        # What is known of larger messages clears the smaller ones.
        return message.strikes > 0 and message.size > self._largest

    def acknowledged(self, message: Outgoing) -> None:
        """The broker takes messages of this size."""
        self._answered = True
        self.wants_answer = False
        self._largest = max(self._largest, message.size)
        if message is self._alone:
            self._alone = None

    def hung_up(self, in_flight: Iterable[Outgoing]) -> Outgoing | None:
        """The broker closed the connection; the message that is to be given up for it, if there is one."""
        suspect = self._alone
        if suspect is None:
            for message in in_flight:
                if message.size > self._largest and not message.strikes:
                    message.strikes = 1
        elif self._clock() - self._sent_at <= _AT_ONCE:
            suspect.strikes += 1
            if suspect.strikes >= _MOST_STRIKES:
                return suspect
        return None
