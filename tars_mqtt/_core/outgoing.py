"""One message on its way to the broker."""

from __future__ import annotations

import attrs

from tars_mqtt.message import PublishReceipt


@attrs.define(eq=False)
class Outgoing:
    """What was admitted to the way out. What comes after the receipt: owned by the network thread."""

    topic: bytes
    payload: bytes
    qos: int
    retain: bool
    receipt: PublishReceipt
    packet_id: int = 0
    sent: bool = False
    received: bool = False
    """PUBREC came: the broker has it, only the release is still to be said (QoS 2)."""
    number: int = 0
    """Its number in the durable outbox; 0 where it is in memory only."""
    stored_at: float = 0.0
    """Unix time."""
    strikes: int = 0
    """How often the broker hung up over it, as far as can be told."""

    @property
    def size(self) -> int:
        return len(self.topic) + len(self.payload)
