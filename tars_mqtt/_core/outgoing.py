"""One message on its way to the broker."""

from __future__ import annotations

from typing import NamedTuple

import attrs

from tars_mqtt._core.property import Properties
from tars_mqtt.errors import ClosedError
from tars_mqtt.message import PublishReceipt


class Stored(NamedTuple):
    """Where a message lies in the durable outbox, and since when."""

    number: int
    at: float
    """Unix time."""


# There are as many of these as an outage is long: each attribute counts.
@attrs.define(eq=False, weakref_slot=False)
class Outgoing:
    """What was admitted to the way out. After the receipt: owned by the network thread once it is queued."""

    topic: bytes
    payload: bytes
    qos: int
    retain: bool
    receipt: PublishReceipt
    properties: Properties | None = None
    packet_id: int = 0
    sent: bool = False
    received: bool = False
    """PUBREC came: the broker has it, only the release is still to be said (QoS 2)."""
    stored: Stored | None = None
    """None where it is in memory only."""
    strikes: int = 0
    """How often the broker hung up over it, as far as can be told."""

    @property
    def size(self) -> int:
        size = len(self.topic) + len(self.payload)
        return size if self.properties is None else size + len(self.properties.raw)


def left_in_outbox() -> ClosedError:
    """What the receipt of a message says that stays in the file."""
    return ClosedError(
        "the client was shut down before the broker acknowledged the message; "
        "it stays in the outbox, and goes out at the next start"
    )
