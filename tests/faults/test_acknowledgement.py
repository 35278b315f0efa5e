"""Acknowledgements that come late, twice, wrong or never, in both directions: each message comes out right."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from tars_mqtt import Envelope, PublishRejectedError
from tests.support import PacketType, ScriptedBroker, accept_and_serve, eventually, numbers
from tests.support import packet as mqtt

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support import ScriptedConnection

VERSIONS = ("5", "3.1.1")

ORDERS: dict[str, Callable[[list[int]], list[int]]] = {
    "in order": lambda ids: ids,
    "twice": lambda ids: [each for each in ids for _ in range(2)],
    "for unknown ids": lambda ids: [50_000, 60_000, *ids],
    "out of order": lambda ids: ids[::-1],
}


def read_ids(connection: ScriptedConnection, count: int) -> list[int]:
    """The packet ids of the next PUBLISHes."""
    packets = [connection.expect(PacketType.PUBLISH) for _ in range(count)]
    return [mqtt.read_publish(packet, connection.level).packet_id for packet in packets]


# -- outgoing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", VERSIONS)
@pytest.mark.parametrize("order", list(ORDERS))
def test_pubacks_settle_what_they_name_and_nothing_else(make_client, order: str, protocol: str) -> None:
    """The third message is acknowledged last, and by nothing that is not for it."""
    others_done = threading.Event()

    def script(connection: ScriptedConnection) -> None:
        connection.accept()
        *ids, last = read_ids(connection, 4)
        connection.send(*map(mqtt.puback, ORDERS[order](ids)))
        # Right for the id, wrong for the QoS.
        connection.send(mqtt.pubcomp(last), mqtt.pubrec(last))
        connection.expect(PacketType.PUBREL)  # nobody knows of such a message: so be it
        others_done.wait(20)
        connection.send(mqtt.puback(last))
        connection.serve()

    with ScriptedBroker(script) as broker:
        client = make_client(broker.url, protocol=protocol)
        client.connect()
        *receipts, last = [client.submit_event("a", "n", number, qos=1) for number in range(4)]
        for receipt in receipts:
            receipt.result(10)
        broker.wait_for(PacketType.PUBREL)
        assert not last.done()
        others_done.set()
        last.result(10)
        stats = client.stats()
        assert (stats.acknowledged, stats.inflight, stats.queued, stats.connections) == (4, 0, 0, 1)


@pytest.mark.parametrize("protocol", VERSIONS)
@pytest.mark.parametrize("order", list(ORDERS))
def test_qos_2_is_complete_with_its_own_pubcomp(make_client, order: str, protocol: str) -> None:
    def script(connection: ScriptedConnection) -> None:
        connection.accept()
        ids = ORDERS[order](read_ids(connection, 3))
        connection.send(*map(mqtt.puback, ids))  # right for the id, wrong for the QoS
        connection.send(*map(mqtt.pubrec, ids))
        released = [connection.expect(PacketType.PUBREL).packet_id for _ in ids]
        assert released == ids
        connection.send(*map(mqtt.pubcomp, released))
        connection.serve()

    with ScriptedBroker(script) as broker:
        client = make_client(broker.url, protocol=protocol)
        client.connect()
        receipts = [client.submit_event("a", "n", number, qos=2) for number in range(3)]
        for receipt in receipts:
            receipt.result(10)
        stats = client.stats()
        assert (stats.acknowledged, stats.inflight, stats.queued, stats.connections) == (3, 0, 0, 1)


@pytest.mark.parametrize(("qos", "answer"), [(1, mqtt.puback), (2, mqtt.pubrec)])
def test_every_refusal_of_a_message_fails_it_and_lets_the_others_pass(make_client, qos: int, answer) -> None:
    """MQTT 5 has a code for each reason."""
    codes = [0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99]

    def script(connection: ScriptedConnection) -> None:
        connection.accept()
        for packet_id, code in zip(read_ids(connection, len(codes)), codes, strict=True):
            connection.send(answer(packet_id, code))
        connection.serve()

    with ScriptedBroker(script) as broker:
        client = make_client(broker.url, protocol="5")
        client.connect()
        receipts = [client.submit_event("a", "n", number, qos=qos) for number in range(len(codes))]
        behind = client.submit_event("a", "n", 99, qos=qos)
        for receipt, code in zip(receipts, codes, strict=True):
            with pytest.raises(PublishRejectedError) as caught:
                receipt.result(10)
            assert caught.value.code == code
        behind.result(10)
        assert client.stats().rejected == len(codes)


@pytest.mark.parametrize("protocol", VERSIONS)
def test_an_acknowledgement_that_never_comes_is_waited_for_and_asked_for_on_the_next_connection(
    make_client, protocol: str
) -> None:
    """A connection that lives is not ended over it, and on it nothing is sent twice [MQTT-4.4.0-1]."""
    go_on = threading.Event()

    def swallow(connection: ScriptedConnection) -> None:
        connection.accept()
        ids = read_ids(connection, 3)
        connection.send(mqtt.puback(ids[1]))
        while not go_on.is_set():
            if not connection.is_quiet(0.02):
                connection.answer(connection.expect(PacketType.PINGREQ))

    def serve(connection: ScriptedConnection) -> None:
        connection.accept(session_present=True)
        connection.serve()

    with ScriptedBroker(swallow, serve) as broker:
        client = make_client(broker.url, protocol=protocol, keepalive=1)
        client.connect()
        receipts = [client.submit_event("a", "n", number, qos=1) for number in range(3)]
        broker.wait_for(PacketType.PINGREQ, 2)
        assert [receipt.done() for receipt in receipts] == [False, True, False]
        go_on.set()
        for receipt in receipts:
            receipt.result(10)
        first, again = (
            [
                mqtt.read_publish(packet, connection.level)
                for packet in connection.packets
                if packet.type == PacketType.PUBLISH
            ]
            for connection in broker.connections
        )
        assert [publish.packet_id for publish in again] == [first[0].packet_id, first[2].packet_id]
        assert all(publish.dup for publish in again)
        assert numbers(publish.payload for publish in again) == [0, 2]


def test_what_was_interrupted_is_sent_again_with_dup_and_its_packet_id(make_client) -> None:
    """Of 50 messages five are on their way. The broker hung up: was it the first one? It goes alone then."""
    seen: list[list[mqtt.Publish]] = []

    def interrupt(connection: ScriptedConnection) -> None:
        connection.accept(session_present=connection.number > 1)
        if connection.number > 1:
            connection.answer(connection.expect(PacketType.PINGREQ))
        packets = [connection.expect(PacketType.PUBLISH) for _ in range(5 if connection.number == 1 else 1)]
        seen.append([mqtt.read_publish(packet, connection.level) for packet in packets])

    def behave(connection: ScriptedConnection) -> None:
        connection.accept(session_present=True)
        connection.serve()

    with ScriptedBroker(interrupt, interrupt, behave) as broker:
        client = make_client(broker.url, max_inflight=5)
        client.connect()
        receipts = [client.submit_event("a", "n", number, qos=1) for number in range(50)]
        for receipt in receipts:
            receipt.result(10)
        last = broker.connections[2]
        packets = [packet for packet in last.packets if packet.type == PacketType.PUBLISH]
        seen.append([mqtt.read_publish(packet, last.level) for packet in packets])
    ids = [publish.packet_id for publish in seen[0]]
    assert [[publish.packet_id for publish in each[:5]] for each in seen] == [ids, ids[:1], ids]
    assert [[publish.dup for publish in each[:6]] for each in seen] == [
        [False] * 5,
        [True],
        [True] * 5 + [False],
    ]
    assert numbers(publish.payload for publish in seen[2]) == list(range(50))


@pytest.mark.parametrize("protocol", VERSIONS)
def test_qos_2_interrupted_after_pubrec_is_released_and_not_published_again(
    make_client, protocol: str
) -> None:
    """Else the broker would take it for a second message."""

    def interrupt(connection: ScriptedConnection) -> None:
        connection.accept()
        connection.send(*map(mqtt.pubrec, read_ids(connection, 2)[:1]))
        connection.expect(PacketType.PUBREL)

    def resume(connection: ScriptedConnection) -> None:
        connection.accept(session_present=True)
        connection.serve()

    with ScriptedBroker(interrupt, resume) as broker:
        client = make_client(broker.url, protocol=protocol)
        client.connect()
        receipts = [client.submit_event("a", "n", number, qos=2) for number in range(2)]
        for receipt in receipts:
            receipt.result(10)
        kinds = [
            packet.type
            for packet in broker.connections[1].packets
            if packet.type in (PacketType.PUBLISH, PacketType.PUBREL)
        ]
        assert kinds == [PacketType.PUBREL, PacketType.PUBLISH, PacketType.PUBREL]


# -- incoming -----------------------------------------------------------------------------------------


def delivery(
    connection: ScriptedConnection, packet_id: int, payload: bytes, *, qos: int = 1, dup: bool = False
) -> bytes:
    return mqtt.publish("a", payload, qos=qos, packet_id=packet_id, dup=dup, level=connection.level)


@pytest.mark.parametrize("protocol", VERSIONS)
def test_a_redelivery_of_what_is_in_work_is_handled_once_and_acknowledged_where_it_came_last(
    make_client, protocol: str
) -> None:
    """The connection breaks while the handler works: nothing of it is said on the new one before it is asked for."""
    release, calls = threading.Event(), []

    def handler(payload: bytes) -> None:
        calls.append(payload)
        release.wait(20)

    def first(connection: ScriptedConnection) -> None:
        connection.accept()
        connection.answer(connection.expect(PacketType.SUBSCRIBE))
        connection.send(delivery(connection, 7, b"x"))
        eventually(lambda: calls)

    def second(connection: ScriptedConnection) -> None:
        connection.accept(session_present=True)
        assert connection.is_quiet(0.1)
        connection.send(delivery(connection, 7, b"x", dup=True))
        assert connection.is_quiet(0.1)
        release.set()
        connection.serve()

    with ScriptedBroker(first, second) as broker:
        client = make_client(broker.url, protocol=protocol)
        client.subscribe("a", handler, 1)
        client.connect()
        (acknowledged,) = broker.wait_for(PacketType.PUBACK)
        assert acknowledged.packet_id == 7
        assert acknowledged in broker.connections[1].packets
        assert calls == [b"x"]


@pytest.mark.parametrize("deduplicated", [True, False])
def test_a_redelivery_of_what_was_done_is_handled_again_unless_deduplicated(
    make_client, deduplicated
) -> None:
    """The acknowledgement was lost on its way: at least once, or effectively once."""
    event = Envelope.new("n", 1, source="s").to_bytes()
    calls: list[bytes] = []

    def first(connection: ScriptedConnection) -> None:
        connection.accept()
        connection.answer(connection.expect(PacketType.SUBSCRIBE))
        connection.send(delivery(connection, 7, event))
        connection.expect(PacketType.PUBACK)

    def second(connection: ScriptedConnection) -> None:
        connection.accept(session_present=True)
        connection.send(delivery(connection, 7, event, dup=True))
        connection.serve()

    settings = {"dedupe_ttl": 60, "dedupe_max_entries": 10} if deduplicated else {}
    with ScriptedBroker(first, second) as broker:
        client = make_client(broker.url, **settings)
        client.subscribe("a", calls.append, 1)
        client.connect()
        broker.wait_for(PacketType.PUBACK, 2)
        assert calls == [event] * (1 if deduplicated else 2)
        assert client.stats().duplicates == int(deduplicated)


@pytest.mark.parametrize("protocol", VERSIONS)
def test_redeliveries_on_the_same_connection_are_answered_each_and_handled_once(
    make_client, protocol: str
) -> None:
    """No broker may, but some of MQTT 3.1 still do: a repetition while the first one is in work."""
    release, calls = threading.Event(), []

    def handler(payload: bytes) -> None:
        calls.append(payload)
        release.wait(20)

    def script(connection: ScriptedConnection) -> None:
        connection.accept()
        connection.answer(connection.expect(PacketType.SUBSCRIBE))
        for dup in (False, True, True):
            connection.send(delivery(connection, 7, b"x", dup=dup))
        eventually(lambda: calls)
        release.set()
        connection.serve()

    with ScriptedBroker(script) as broker:
        client = make_client(broker.url, protocol=protocol)
        client.subscribe("a", handler, 1)
        client.connect()
        broker.wait_for(PacketType.PUBACK)
        client.publish("b", b"", qos=1)
        assert {packet.packet_id for packet in broker.received(PacketType.PUBACK)} == {7}
        assert client.stats().connections == 1
        eventually(lambda: client.stats().pending == 0)
        assert calls == [b"x"]


@pytest.mark.parametrize("protocol", VERSIONS)
def test_qos_2_is_handled_once_however_often_it_is_repeated_before_its_release(
    make_client, protocol: str
) -> None:
    """PUBREC was lost with the connection, then PUBCOMP was."""
    calls: list[bytes] = []

    def first(connection: ScriptedConnection) -> None:
        connection.accept()
        connection.answer(connection.expect(PacketType.SUBSCRIBE))
        connection.send(delivery(connection, 7, b"x", qos=2))
        connection.expect(PacketType.PUBREC)

    def second(connection: ScriptedConnection) -> None:
        connection.accept(session_present=True)
        connection.send(delivery(connection, 7, b"x", qos=2, dup=True))
        connection.expect(PacketType.PUBREC)
        connection.send(mqtt.pubrel(7))
        connection.expect(PacketType.PUBCOMP)

    def third(connection: ScriptedConnection) -> None:
        connection.accept(session_present=True)
        connection.send(mqtt.pubrel(7))
        assert connection.expect(PacketType.PUBCOMP).packet_id == 7
        # The id is free again: this is another message.
        connection.send(delivery(connection, 7, b"y", qos=2))
        connection.serve()

    with ScriptedBroker(first, second, third) as broker:
        client = make_client(broker.url, protocol=protocol)
        client.subscribe("a", calls.append, 2)
        client.connect()
        eventually(lambda: calls == [b"x", b"y"])
        broker.wait_for(PacketType.PUBCOMP, 3)


def test_a_session_that_the_broker_forgot_owes_no_acknowledgements(make_client) -> None:
    """The packet id means another message there: it is handled, and acknowledged after its own handler."""
    release, calls = threading.Event(), []

    def handler(payload: bytes) -> None:
        calls.append(payload)
        if payload == b"old":
            release.wait(20)

    def first(connection: ScriptedConnection) -> None:
        connection.accept()
        connection.answer(connection.expect(PacketType.SUBSCRIBE))
        connection.send(delivery(connection, 7, b"old"))
        eventually(lambda: calls)

    def second(connection: ScriptedConnection) -> None:
        connection.accept(session_present=False)
        connection.answer(connection.expect(PacketType.SUBSCRIBE))
        connection.send(delivery(connection, 7, b"new"))
        assert connection.is_quiet(0.1), "the old message's handler works, the new one waits behind it"
        release.set()
        connection.serve()

    with ScriptedBroker(first, second, accept_and_serve) as broker:
        client = make_client(broker.url)
        client.subscribe("a", handler, 1)
        client.connect()
        broker.wait_for(PacketType.PUBACK)
        assert calls == [b"old", b"new"]
        client.publish("b", b"", qos=1)
        assert len(broker.received(PacketType.PUBACK)) == 1
