"""A service before and after its migration, as in docs/MIGRATION_GUIDE.md: nobody else sees a difference."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import eventually
from tests.support.example import Example, examples_in, running
from tests.support.observer import Observer, Seen

if TYPE_CHECKING:
    from tests.support import Broker

GUIDE = Path(__file__).parents[2] / "docs" / "MIGRATION_GUIDE.md"
NAME = "shouter"
SECTION = {example.heading.partition(":")[0]: example for example in examples_in(GUIDE)}
BEFORE, AFTER = SECTION["Before"], SECTION["After"]


def test_the_stated_line_counts_are_right():
    """At least 40 lines become at most 10, blank ones not counted."""
    counts = [sum(bool(line.strip()) for line in example.code.splitlines()) for example in (BEFORE, AFTER)]
    stated = [int(number) for example in (BEFORE, AFTER) for number in re.findall(r"\d+", example.heading)]
    assert counts == stated
    assert counts[0] >= 40
    assert counts[1] <= 10


def serve_some_requests(service: Example, broker: Broker) -> list[Seen]:
    """What arrives while the service answers two requests, takes two that are none, and then ends."""
    with Observer(broker.host, broker.port) as observer:
        with running(service, {"MQTT_URL": broker.url, "MQTT_CLIENT_ID": NAME}):
            observer.wait_for(f"system/health/{NAME}")
            observer.publish("requests/a", request(1, {"text": "hello"}))
            observer.publish("requests/b", b"no JSON")
            observer.publish("requests/c", request(2, {"text": "good bye"}))
            observer.wait_for("replies", 2)
            # asyncio.wait_for of Python 3.11 loses a cancellation that meets its result, and with it the
            # Ctrl-C of the service before: let it be through with its reply.
            observer.publish("requests/b", request(3, {"words": "no text"}))
            eventually(lambda: broker.log.count(f"Received PUBACK from {NAME}") == 4)
        observer.wait_for(f"system/health/{NAME}", 2)
        return observer.seen


def request(number: int, data: dict[str, Any]) -> dict[str, Any]:
    return {"id": f"{number:032}", "type": "shout", "ts": 1.0, "source": "test", "data": data}


def others_see(seen: list[Seen]) -> list[tuple[Any, ...]]:
    """What the service published, without what no two messages have in common: ids and times."""
    published = []
    for topic in ("replies", f"system/health/{NAME}"):
        for message in (message for message in seen if message.topic == topic):
            envelope = message.envelope
            assert re.fullmatch("[0-9a-f]{32}", envelope.pop("id"))
            assert envelope.pop("ts") > 1.7e9
            envelope["data"].pop("timestamp", None)
            published.append((topic, message.qos, message.retain, envelope))
    return published


def test_both_services_answer_alike(make_broker):
    """The same replies with the same correlation ids, and the same health, QoS and retain flags."""
    before, after = (others_see(serve_some_requests(service, make_broker())) for service in (BEFORE, AFTER))
    assert after == before
    assert [(topic, envelope["data"]) for topic, _, _, envelope in after] == [
        ("replies", {"text": "HELLO"}),
        ("replies", {"text": "GOOD BYE"}),
        (f"system/health/{NAME}", {"ok": True, "event": "ready"}),
        (f"system/health/{NAME}", {"ok": False, "event": "shutdown"}),
    ]


@pytest.mark.parametrize("service", [BEFORE, AFTER], ids=["before", "after"])
def test_a_killed_service_is_seen_as_unhealthy(service, broker):
    """Both leave the same last will."""
    with Observer(broker.host, broker.port) as observer:
        with running(service, {"MQTT_URL": broker.url, "MQTT_CLIENT_ID": NAME}) as process:
            observer.wait_for(f"system/health/{NAME}")
            process.kill()
            eventually(lambda: process.poll() is not None)
        _, will = others_see(observer.wait_for(f"system/health/{NAME}", 2))
    _, qos, retain, envelope = will
    assert (qos, retain) == (1, True)
    assert envelope["data"] == {"ok": False, "event": "connection_lost"}
