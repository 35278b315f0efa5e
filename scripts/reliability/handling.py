"""Handlers that take their time, and handlers that fail."""

from __future__ import annotations

import contextlib
import json
import threading
import time

from reliability import contender
from reliability.outcome import Outcome
from tests.support import Broker, FaultProxy, eventually
from tests.support import packet as mqtt
from tests.support.observer import Observer
from tests.support.packet import PacketType

_KEEPALIVE = 3


def slow(client_name: str, quick: bool) -> Outcome:
    """While one handler blocks, others are to be called, and publishes to be acknowledged."""
    blocks = 1.0 if quick else 10.0
    began = threading.Event()
    others: list[int] = []

    def block(_: bytes) -> None:
        began.set()
        time.sleep(blocks)

    with Broker() as broker:
        client = contender.make(client_name, broker.url, "slow", contender.Settings(keepalive=_KEEPALIVE))
        client.subscribe("slow", block)
        client.subscribe("other", lambda payload: others.append(json.loads(payload)["data"]))
        client.connect()
        client.submit("slow", 0)
        assert began.wait(10), "the handler is not called"
        until = time.monotonic() + blocks
        submitted = acknowledged = 0
        while time.monotonic() < until - blocks / 10:
            acknowledged += _acknowledged(client, submitted, until)
            submitted += 1
        handled = len(others)
        eventually(lambda: "exceeded timeout" in broker.log or len(others) >= submitted, 20)
        lost = broker.log.count("exceeded timeout")
        client.close(2)
    connection = f"disconnected {lost} times" if lost else "stays connected"
    return Outcome(
        f"{connection}; meanwhile {acknowledged} of {submitted} published are acknowledged, {handled} handled",
        met=not lost and acknowledged == submitted and handled >= submitted - 1,
    )


def _acknowledged(client: contender.Client, number: int, until: float) -> bool:
    """Whether a publish comes back while the other handler still blocks, until *until*."""
    try:
        client.submit("other", number).result(max(0.1, until - time.monotonic()))
    except TimeoutError:
        return False
    in_time = time.monotonic() < until
    time.sleep(0.1)
    return in_time


def failing(client_name: str, quick: bool) -> Outcome:
    count = 100 if quick else 1_000
    seen: list[int] = []

    def fail_sometimes(payload: bytes) -> None:
        number = json.loads(payload)["data"]
        seen.append(number)
        if number % 10 == 9:
            raise RuntimeError("out of order")

    with Broker() as broker, FaultProxy(broker.url, record=True) as proxy:
        client = contender.make(client_name, proxy.url, "failing", contender.Settings())
        client.subscribe("failing", fail_sometimes)
        client.connect()
        with Observer(broker.host, broker.port, "nothing") as publisher:
            for number in range(count):
                publisher.publish("failing", {"data": number})
        with contextlib.suppress(AssertionError):  # fewer are a result, too
            eventually(lambda: len(set(seen)) == count == _acknowledged_in_order(proxy), 10)
        in_order = _acknowledged_in_order(proxy)
        client.close(2)
    return Outcome(
        f"{len(set(seen)):,} seen, {in_order:,} acknowledged in order",
        met=len(set(seen)) == count == in_order,
    )


def _acknowledged_in_order(proxy: FaultProxy) -> int:
    """How many were acknowledged, if that was in the order in which they came; else 0."""
    from_client, to_client = proxy.packets("to_broker", 0), proxy.packets("to_client", 0)
    level = mqtt.read_connect(from_client[0]).level
    came = [mqtt.read_publish(each, level).packet_id for each in to_client if each.type == PacketType.PUBLISH]
    went = [each.packet_id for each in from_client if each.type == PacketType.PUBACK]
    return len(went) if went == came[: len(went)] else 0
