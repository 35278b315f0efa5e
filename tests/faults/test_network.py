"""A network and a broker that misbehave in every way: nothing accepted is lost, and the client comes back."""

from __future__ import annotations

import re
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tars_mqtt import MQTTClient
from tests.support import FaultProxy, ScriptedBroker
from tests.support import packet as mqtt
from tests.support.packet import PacketType
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support import Broker

QUICK = {"reconnect_min_delay": 0.1, "reconnect_max_delay": 0.5}


def numbers(payloads: list[bytes]) -> list[int]:
    return [int(re.search(rb'"data":(\d+)', payload)[1]) for payload in payloads]  # type: ignore[index]


class Traffic:
    """A publisher and a listener behind the same bad network; counts what arrives."""

    def __init__(self, make_client: Any, url: str, **settings: Any) -> None:
        self.received: list[bytes] = []
        self.receipts: list[Any] = []
        self.listener = make_client(url, client_id="listener", session_expiry=3600, **QUICK, **settings)
        self.listener.subscribe("a", self.received.append, 1)
        self.listener.connect()
        self.publisher = make_client(url, client_id="publisher", **QUICK, **settings)
        self.publisher.connect()

    def publish(self, count: int) -> None:
        for _ in range(count):
            self.receipts.append(self.publisher.submit_event("a", "n", len(self.receipts), qos=1))

    def reconnects(self) -> tuple[int, int]:
        return self.listener.stats().reconnects, self.publisher.stats().reconnects

    def nothing_is_lost(self) -> None:
        for receipt in self.receipts:
            receipt.result(20)
        eventually(lambda: set(numbers(self.received)) == set(range(len(self.receipts))), 20)


def more_reconnects(client: Any, before: int) -> bool:
    return client.stats().reconnects > before


@pytest.fixture
def behind(broker: Broker) -> Iterator[FaultProxy]:
    with FaultProxy(broker.url) as proxy:
        yield proxy


def cut(proxy: FaultProxy) -> None:
    proxy.cut()


def hang_up(proxy: FaultProxy) -> None:
    proxy.hang_up()


def half_close(proxy: FaultProxy) -> None:
    proxy.half_close()


def refuse_for_a_while(proxy: FaultProxy) -> None:
    proxy.refuse()
    proxy.cut()
    threading.Timer(0.3, proxy.accept).start()


@pytest.mark.parametrize(
    "fault", [cut, hang_up, half_close, refuse_for_a_while], ids=lambda fault: fault.__name__
)
def test_connections_that_break_lose_nothing(
    make_client: Any, behind: FaultProxy, fault: Callable[[FaultProxy], None]
) -> None:
    """RST, FIN, half of a FIN, and a listener that is gone for a while; three times, under traffic."""
    traffic = Traffic(make_client, behind.url)
    for _ in range(3):
        traffic.publish(50)
        reconnects = traffic.reconnects()
        fault(behind)
        traffic.publish(50)
        for before, client in zip(reconnects, (traffic.listener, traffic.publisher), strict=True):
            eventually(partial(more_reconnects, client, before))
    traffic.nothing_is_lost()


def test_a_blackholed_link_is_noticed_and_nothing_is_lost(make_client: Any, behind: FaultProxy) -> None:
    traffic = Traffic(make_client, behind.url, keepalive=1)
    traffic.publish(20)
    behind.stall()
    traffic.publish(20)
    eventually(lambda: not traffic.publisher.connected, 5)
    behind.resume()
    traffic.nothing_is_lost()


def test_a_link_that_hands_out_single_bytes_changes_nothing(make_client: Any, behind: FaultProxy) -> None:
    behind.slice(1)
    traffic = Traffic(make_client, behind.url)
    traffic.publish(20)
    traffic.nothing_is_lost()
    assert numbers(traffic.received) == list(range(20))
    assert traffic.publisher.stats().connections == 1


def test_latency_is_borne_by_the_window(make_client: Any, behind: FaultProxy) -> None:
    """100 ms each way: 200 messages take a few round trips, not 200."""
    behind.latency(0.1)
    traffic = Traffic(make_client, behind.url)
    traffic.publish(200)
    traffic.nothing_is_lost()
    assert numbers(traffic.received) == list(range(200))


def test_a_narrow_link_is_waited_for(make_client: Any, behind: FaultProxy) -> None:
    """64 kB/s: a message of 100 kB takes a while, and no impatience cuts it off."""
    traffic = Traffic(make_client, behind.url, keepalive=4)
    behind.bandwidth(64_000)
    receipt = traffic.publisher.submit_event("large", "n", "x" * 100_000, qos=1)
    assert receipt.result(20) == receipt.envelope_id
    assert traffic.publisher.stats().connections == 1


@pytest.mark.parametrize("direction", ["to_broker", "to_client"])
def test_a_flipped_bit_costs_a_connection_at_most(
    make_client: Any, behind: FaultProxy, direction: Any
) -> None:
    """In the fixed header of a packet under way: whoever notices hangs up, and all is sent again."""
    traffic = Traffic(make_client, behind.url)
    traffic.publish(5)
    traffic.nothing_is_lost()
    behind.flip_bit(0, direction, bit=7)
    traffic.publish(20)
    traffic.nothing_is_lost()


# -- a broker that is killed -------------------------------------------------------------------------


def test_kill_9_of_a_broker_that_remembers_loses_nothing(make_client: Any, make_broker: Any) -> None:
    broker = make_broker(persistence=True)
    traffic = Traffic(make_client, broker.url)
    for _ in range(2):
        traffic.publish(30)
        for receipt in traffic.receipts:
            receipt.result(10)
        eventually(lambda: len(set(numbers(traffic.received))) == len(traffic.receipts))
        broker.kill()
        eventually(lambda: not traffic.publisher.connected)
        traffic.publish(30)
        broker.start()
        traffic.nothing_is_lost()


def test_a_frozen_broker_loses_nothing(make_client: Any, broker: Broker) -> None:
    traffic = Traffic(make_client, broker.url, keepalive=1)
    broker.freeze()
    traffic.publish(30)
    eventually(lambda: not traffic.publisher.connected, 5)
    broker.thaw()
    traffic.nothing_is_lost()


# -- a broker that breaks the rules --------------------------------------------------------------------


def malformed(level: int) -> dict[str, bytes]:
    good = mqtt.publish("a", b"x", qos=1, packet_id=1, level=level)
    return {
        "remaining length of five bytes": b"\x30\xff\xff\xff\xff\x01",
        "QoS 3": bytes((good[0] | 0x06,)) + good[1:],
        "a reserved type": b"\x00\x00",
        "a wildcard in the topic": mqtt.publish("a/#", b"x", level=level),
        "a topic that is not UTF-8": mqtt.publish("aa", b"x", level=level).replace(b"aa", b"\xff\xfe"),
        "a topic longer than the packet": b"\x30\x03\xff\xff\x61",
        "packet id 0": mqtt.publish("a", b"x", qos=1, packet_id=0, level=level),
        "a second CONNACK": mqtt.connack(level=level),
        "PUBACK of one byte": b"\x40\x01\x00",
        "SUBACK without codes": b"\x90\x01\x00",
    }


@pytest.mark.parametrize("what", list(malformed(mqtt.V5)))
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_malformed_packet_costs_one_connection(make_client: Any, what: str, protocol: str) -> None:
    """The network thread survives it, the next connection works."""

    def spoil(connection: Any) -> None:
        connection.accept()
        connection.answer(connection.expect(PacketType.SUBSCRIBE))
        connection.send(malformed(connection.level)[what])
        connection.serve()

    def behave(connection: Any) -> None:
        connection.accept()
        connection.serve()

    with ScriptedBroker(spoil, behave) as broker:
        client = make_client(broker.url, protocol=protocol, **QUICK)
        client.subscribe("a", print)
        client.connect()
        eventually(lambda: client.stats().connections == 2 and client.connected)
        client.publish("b", b"fine", qos=1)


def test_a_length_of_256_megabytes_takes_no_memory_until_it_comes(make_client: Any) -> None:
    def promise(connection: Any) -> None:
        connection.accept()
        connection.send(b"\x30\xff\xff\xff\x7f" + b"x" * 1000)
        connection.hold()

    with ScriptedBroker(promise) as broker:
        client = make_client(broker.url, **QUICK)
        client.connect()
        eventually(lambda: client.stats().bytes_in > 1000)
        assert client.connected


@pytest.mark.parametrize("answer", ["never", "twice", "unknown", "out of order"])
def test_acknowledgements_that_break_the_rules_settle_nothing_wrong(make_client: Any, answer: str) -> None:
    def behave(connection: Any) -> None:
        connection.accept()
        packets = [connection.expect(PacketType.PUBLISH) for _ in range(3)]
        ids = [mqtt.read_publish(packet, connection.level).packet_id for packet in packets]
        if answer == "twice":
            ids = [each for each in ids for _ in range(2)]
        elif answer == "unknown":
            ids = [1, 60_000, *ids]
        elif answer == "out of order":
            ids.reverse()
        if answer != "never":
            connection.send(*(mqtt.puback(each) for each in ids))
        connection.serve()

    with ScriptedBroker(behave) as broker:
        client = make_client(broker.url, **QUICK)
        client.connect()
        receipts = [client.submit_event("a", "n", number, qos=1) for number in range(3)]
        if answer == "never":
            broker.wait_for(PacketType.PUBLISH, 3)
            assert not any(receipt.done() for receipt in receipts)
        else:
            for receipt in receipts:
                receipt.result(5)
        assert client.stats().connections == 1


def test_what_was_interrupted_is_sent_again_with_dup_and_its_packet_id(make_client: Any) -> None:
    """Of 50 messages five are on their way. The broker hung up: was it the first one? It goes alone then."""
    seen: list[list[mqtt.Publish]] = []

    def interrupt(connection: Any) -> None:
        connection.accept(session_present=connection.number > 1)
        packets = [connection.expect(PacketType.PUBLISH) for _ in range(5 if connection.number == 1 else 1)]
        seen.append([mqtt.read_publish(packet, connection.level) for packet in packets])

    def behave(connection: Any) -> None:
        connection.accept(session_present=True)
        connection.serve()

    with ScriptedBroker(interrupt, interrupt, behave) as broker:
        client = make_client(broker.url, max_inflight=5, **QUICK)
        client.connect()
        receipts = [client.submit_event("a", "n", number, qos=1) for number in range(50)]
        for receipt in receipts:
            receipt.result(10)
        last = broker.connections[2]
        seen.append(
            [
                mqtt.read_publish(packet, last.level)
                for packet in last.packets
                if packet.type == PacketType.PUBLISH
            ]
        )
    ids = [publish.packet_id for publish in seen[0]]
    assert [[publish.packet_id for publish in each[:5]] for each in seen] == [ids, ids[:1], ids]
    assert [[publish.dup for publish in each[:6]] for each in seen] == [
        [False] * 5,
        [True],
        [True] * 5 + [False],
    ]
    assert numbers([publish.payload for publish in seen[2]]) == list(range(50))


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_message_too_large_for_the_broker_fails_alone(
    make_client: Any, make_broker: Any, protocol: str
) -> None:
    """MQTT 5 names the limit; in 3.1.1 the broker hangs up, and we find out over which message."""
    broker = make_broker(["max_packet_size 20000"])
    received: list[bytes] = []
    client = make_client(broker.url, protocol=protocol, **QUICK)
    client.subscribe("a", received.append, 1)
    client.connect()
    before = [client.submit_event("a", "n", number, qos=1) for number in range(10)]
    large = client.submit_event("large", "n", "x" * 50_000, qos=1)
    behind = [client.submit_event("a", "n", number, qos=1) for number in range(10, 20)]
    error = large.exception(15)
    assert "too large" in str(error) or "more than the broker allows" in str(error)
    for receipt in before + behind:
        receipt.result(10)
    eventually(lambda: set(numbers(received)) == set(range(20)))


def test_two_hundred_clients_come_back_spread_over_time(broker: Broker) -> None:
    """Full jitter: no stampede, and nobody stays away."""
    clients = [
        MQTTClient(broker.url, f"fleet-{number}", shutdown_timeout=5.0, session_expiry=0, **QUICK)
        for number in range(200)
    ]
    try:
        for client in clients:
            client.connect()
        broker.kill()
        broker.start()
        eventually(
            lambda: all(client.stats().connections == 2 and client.connected for client in clients), 30
        )
    finally:
        for client in clients:
            client.shutdown()
