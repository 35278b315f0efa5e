"""The identical work: an envelope of about 230 bytes, as a user of each client would write and read it."""

from __future__ import annotations

from time import time
from typing import Any
from uuid import uuid4

import ujson

TOPIC = "bench/00000/event"
TYPE = "user.login"
SOURCE = "bench"


def data(number: int, note: str = "") -> dict[str, Any]:
    """What one event says."""
    return {
        "user_id": number,
        "name": "Grace Hopper",
        "email": "grace.hopper@example.org",
        "roles": ["admin", "auditor"],
        "remote": {"address": "192.0.2.17", "port": 52_144},
        "note": note,
    }


def envelope(event_type: str, event_data: dict[str, Any]) -> dict[str, Any]:
    return {"id": uuid4().hex, "type": event_type, "ts": time(), "source": SOURCE, "data": event_data}


def encode(event_type: str, event_data: dict[str, Any]) -> bytes:
    """An envelope's bytes; for the clients that have no envelopes of their own."""
    return ujson.dumps(
        envelope(event_type, event_data), ensure_ascii=False, escape_forward_slashes=False
    ).encode()


decode = ujson.loads
