"""Limits of ours and of the broker: what is beyond them is refused aloud, and what is within them arrives."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

import pytest

from tars_mqtt import PublishRejectedError, QueueFullError
from tests.support import (
    Broker,
    PacketType,
    ScriptedBroker,
    accept_and_leave,
    eventually,
    numbers,
)
from tests.support import packet as mqtt
from tests.support.packet import Property

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support import ScriptedConnection

VERSIONS = ("5", "3.1.1")


# -- the window ---------------------------------------------------------------------------------------


class SlowBroker:
    """A script that acknowledges when nothing more comes, and takes note of how much there was by then."""

    def __init__(self, receive_maximum: int | None, until: int) -> None:
        self.most_unacknowledged = 0
        self.publishes: list[mqtt.Publish] = []
        self._properties = {Property.RECEIVE_MAXIMUM: receive_maximum} if receive_maximum else {}
        self._until = until

    def __call__(self, connection: ScriptedConnection) -> None:
        connection.accept(session_present=connection.number > 1, properties=self._properties)
        unacknowledged: deque[int] = deque()
        while len(self.publishes) < self._until or unacknowledged:
            if unacknowledged and connection.is_quiet(0.005):
                connection.send(*map(mqtt.puback, unacknowledged))
                unacknowledged.clear()
                continue
            packet = connection.read()
            if packet.type == PacketType.PUBLISH:
                publish = mqtt.read_publish(packet, connection.level)
                self.publishes.append(publish)
                unacknowledged.append(publish.packet_id)
                self.most_unacknowledged = max(self.most_unacknowledged, len(unacknowledged))
            else:
                connection.answer(packet)
        connection.serve()


@pytest.mark.parametrize(
    ("protocol", "max_inflight", "receive_maximum", "window"),
    [("5", 64, 20, 20), ("5", 20, 100, 20), ("3.1.1", 20, None, 20)],
)
def test_no_more_than_the_window_is_unacknowledged_when_a_backlog_goes_out(
    make_client, protocol: str, max_inflight: int, receive_maximum: int | None, window: int
) -> None:
    """2,000 wait when the broker comes back; it gets them in order, and never more than it asked for."""
    behind_it = SlowBroker(receive_maximum, until=2000)
    may_return = threading.Event()

    def stay_away(connection: ScriptedConnection) -> None:
        may_return.wait(20)
        connection.reset()

    with ScriptedBroker(accept_and_leave, stay_away, behind_it) as broker:
        client = make_client(broker.url, protocol=protocol, max_inflight=max_inflight)
        client.connect()
        eventually(lambda: not client.connected)
        receipts = [client.submit_event("a", "n", number, qos=1) for number in range(2000)]
        may_return.set()
        for receipt in receipts:
            receipt.result(30)
    assert behind_it.most_unacknowledged == window
    assert numbers(publish.payload for publish in behind_it.publishes) == list(range(2000))


@pytest.mark.parametrize("protocol", VERSIONS)
def test_the_window_holds_for_what_is_sent_again_too(make_client, protocol: str) -> None:
    """Ten are on their way when the connection breaks, and are sent again among the first ten."""

    def swallow(connection: ScriptedConnection) -> None:
        connection.accept()
        (first, *_) = [connection.expect(PacketType.PUBLISH) for _ in range(10)]
        # A large one has arrived before: nothing here is suspected of being too large.
        connection.send(mqtt.puback(mqtt.read_publish(first, connection.level).packet_id))
        connection.expect(PacketType.PUBLISH)

    then = SlowBroker(None, until=200)
    with ScriptedBroker(swallow, then) as broker:
        client = make_client(broker.url, protocol=protocol, max_inflight=10)
        client.connect()
        client.submit_event("large", "n", "x" * 1000, qos=1)
        receipts = [client.submit_event("a", "n", number, qos=1) for number in range(200)]
        for receipt in receipts:
            receipt.result(30)
    assert then.most_unacknowledged == 10
    assert [publish.dup for publish in then.publishes] == [True] * 10 + [False] * 190
    assert numbers(publish.payload for publish in then.publishes) == list(range(200))


# -- too large ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", VERSIONS)
@pytest.mark.parametrize("qos", [1, 2])
def test_a_message_too_large_for_the_broker_fails_alone(
    make_client, make_broker: Callable[..., Broker], protocol: str, qos: int
) -> None:
    """MQTT 5 names the limit; in 3.1.1 the broker hangs up, and we find out over which message."""
    broker = make_broker(["max_packet_size 20000"])
    received: list[bytes] = []
    client = make_client(broker.url, protocol=protocol)
    client.subscribe("a", received.append, 2)
    client.connect()
    before = [client.submit_event("a", "n", number, qos=qos) for number in range(10)]
    large = client.submit_event("large", "n", "x" * 50_000, qos=qos)
    behind = [client.submit_event("a", "n", number, qos=qos) for number in range(10, 20)]
    error = large.exception(20)
    assert isinstance(error, PublishRejectedError)
    assert "too large" in str(error) or "more than the broker allows" in str(error)
    for receipt in before + behind:
        receipt.result(20)
    eventually(lambda: set(numbers(received)) == set(range(20)))
    assert client.stats().rejected == 1


@pytest.mark.parametrize("protocol", VERSIONS)
def test_a_payload_larger_than_mqtt_can_say_is_refused_at_once(make_client, broker: Broker, protocol) -> None:
    """On the caller's line, whatever the settings allow; it costs nothing else."""
    client = make_client(broker.url, protocol=protocol, max_queued_bytes=2**30)
    client.connect()
    for qos in (0, 1):
        with pytest.raises(PublishRejectedError, match="larger than MQTT can carry"):
            client.publish("a", bytes(2**28), qos=qos)
    client.publish("a", b"small", qos=1)
    assert client.stats().connections == 1


# -- full ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outbox", [False, True])
def test_during_an_outage_the_bound_holds_and_every_refusal_is_seen(
    make_client, broker: Broker, tmp_path, outbox: bool
) -> None:
    """Of 800 events 500 are taken, and exactly these arrive, in order."""
    limits = (
        {"outbox": str(tmp_path / "outbox.db"), "outbox_max_messages": 500} if outbox else {"max_queued": 500}
    )
    received: list[bytes] = []
    client = make_client(broker.url, **limits)
    client.subscribe("a", received.append, 1)
    client.connect()
    broker.kill()
    eventually(lambda: not client.connected)
    taken, refused = [], 0
    for number in range(800):
        try:
            taken.append(client.submit_event("a", "n", number, qos=1, timeout=0))
        except QueueFullError:
            refused += 1
    assert (len(taken), refused, client.stats().queued) == (500, 300, 500)
    broker.start()
    for receipt in taken:
        receipt.result(20)
    eventually(lambda: len(received) == 500)
    assert numbers(received) == list(range(500))


def test_who_waits_for_room_gets_it_when_the_broker_is_back(make_client, broker: Broker) -> None:
    """From several threads; none is forgotten, and none beyond the bound."""
    received: list[bytes] = []
    client = make_client(broker.url, max_queued=10)
    client.subscribe("a", received.append, 1)
    client.connect()
    broker.kill()
    eventually(lambda: not client.connected)
    most: list[int] = []

    def work(first: int) -> None:
        for number in range(first, first + 25):
            client.publish_event("a", "n", number, qos=1, timeout=30)
            most.append(client.stats().queued)

    threads = [threading.Thread(target=work, args=(25 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    broker.start()
    for thread in threads:
        thread.join(30)
    eventually(lambda: sorted(numbers(received)) == list(range(100)))
    assert max(most) <= 10


@pytest.mark.parametrize("protocol", VERSIONS)
def test_a_flood_for_a_handler_that_is_stuck_waits_at_the_broker(
    make_client, broker: Broker, protocol: str
) -> None:
    """QoS 1: no more than max_pending is held here, nothing is dropped, and the connection lives."""
    release = threading.Event()
    received: list[bytes] = []

    def handler(payload: bytes) -> None:
        release.wait(30)
        received.append(payload)

    listener = make_client(broker.url, protocol=protocol, max_pending=10, keepalive=1)
    listener.subscribe("a", handler, 1)
    listener.connect()
    publisher = make_client(broker.url)
    publisher.connect()
    receipts = [publisher.submit_event("a", "n", number, qos=1) for number in range(200)]
    for receipt in receipts:
        receipt.result(20)
    threading.Event().wait(2.0)  # longer than the watchdog's patience
    assert listener.stats().pending <= (10 if protocol == "5" else 200)
    assert listener.stats().connections == 1
    release.set()
    eventually(lambda: len(received) == 200)
    assert numbers(received) == list(range(200))
    assert not listener.stats().dropped


def test_a_flood_of_qos_0_costs_its_oldest_and_each_is_counted(make_client, broker: Broker) -> None:
    release = threading.Event()
    received: list[bytes] = []

    def handler(payload: bytes) -> None:
        release.wait(30)
        received.append(payload)

    client = make_client(broker.url, max_pending=20)
    client.subscribe("a", handler, 0)
    client.connect()
    for number in range(200):
        client.publish_event("a", "n", number)
    eventually(lambda: client.stats().dropped.get("max_pending") == 180)
    eventually(lambda: client.stats().messages_in == 200)  # counted when all of them have found their place
    assert client.stats().pending == 20
    release.set()
    eventually(lambda: len(received) == 20)
    assert numbers(received)[-19:] == list(range(181, 200))
