"""Everything that can go wrong between CONNECT and the last SUBACK, at the first connection and at later ones."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from tars_mqtt import ConnectError, SubscribeError
from tests.support import (
    PacketType,
    ScriptedBroker,
    accept_and_leave,
    accept_and_serve,
    eventually,
)
from tests.support import packet as mqtt
from tests.support.wait import connect_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support import Packet, ScriptedConnection

VERSIONS = ("5", "3.1.1")
CONNACK_CODES = {"5": range(0x80, 0xA3), "3.1.1": range(1, 6)}
SUBACK_CODES = {"5": (0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2), "3.1.1": (0x80,)}


def answer_subscribe(
    with_codes: Callable[[str], list[int] | None],
) -> Callable[[ScriptedConnection], None]:
    """A script that answers each SUBSCRIBE with the codes for its filter; None leaves it unanswered."""

    def script(connection: ScriptedConnection) -> None:
        def instead(packet: Packet) -> bool:
            if packet.type != PacketType.SUBSCRIBE:
                return False
            request = mqtt.read_subscribe(packet, connection.level)
            codes = with_codes(request.filters[0][0])
            if codes is not None:
                connection.send(mqtt.suback(request.packet_id, codes, level=connection.level))
            return True

        connection.accept()
        connection.serve(instead)

    return script


# -- CONNACK ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", VERSIONS)
def test_no_refusal_ends_a_service_that_was_connected_before(
    make_client, at_once: None, protocol: str
) -> None:
    """Every code there is, one reconnect after the other: operators mend rules, brokers come back to their senses."""
    codes = CONNACK_CODES[protocol]
    refusals = [lambda connection, code=code: connection.accept(code) for code in codes]
    with ScriptedBroker(accept_and_leave, *refusals, accept_and_serve) as broker:
        client = make_client(broker.url, protocol=protocol)
        client.connect()
        receipt = client.submit_event("a", "n", 1, qos=1)
        receipt.result(20)
        assert len(broker.connections) == len(codes) + 2
        assert client.stats().reconnects == 1


def never(connection: ScriptedConnection) -> None:
    connection.expect(PacketType.CONNECT)
    connection.hold()


def hang_up(connection: ScriptedConnection) -> None:
    connection.expect(PacketType.CONNECT)


def reset(connection: ScriptedConnection) -> None:
    connection.expect(PacketType.CONNECT)
    connection.reset()


def hang_up_before_connect(connection: ScriptedConnection) -> None:
    connection.close()


def half_a_connack(connection: ScriptedConnection) -> None:
    connection.expect(PacketType.CONNECT)
    connection.send(b"\x20\x03\x00")


def say(*packets: bytes) -> Callable[[ScriptedConnection], None]:
    def script(connection: ScriptedConnection) -> None:
        connection.expect(PacketType.CONNECT)
        connection.send(*packets)
        connection.hold()

    return script


NO_CONNACK: dict[str, Callable[[ScriptedConnection], None]] = {
    "never": never,
    "FIN": hang_up,
    "RST": reset,
    "FIN before CONNECT": hang_up_before_connect,
    "half of it": half_a_connack,
    "an empty one": say(b"\x20\x00"),
    "one of one byte": say(b"\x20\x01\x00"),
    "properties that end too early": say(b"\x20\x05\x00\x00\x03\x21\x00"),
    "properties longer than the packet": say(b"\x20\x04\x00\x00\x09\x21"),
    "an unknown property": say(b"\x20\x05\x00\x00\x02\x7e\x00"),
    "another packet first": say(mqtt.publish("a", b"x"), mqtt.connack()),
    "PINGRESP": say(mqtt.pingresp()),
    "a web server": say(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "nothing of MQTT": say(bytes(range(256))),
}


@pytest.mark.parametrize("protocol", VERSIONS)
def test_a_broker_without_a_proper_connack_is_tried_again(
    make_client, at_once: None, protocol: str, caplog
) -> None:
    """At a reconnect, with an event waiting; each of them in its turn."""
    with ScriptedBroker(accept_and_leave, *NO_CONNACK.values(), accept_and_serve) as broker:
        client = make_client(broker.url, protocol=protocol, connect_timeout=0.3)
        client.connect(timeout=10)
        client.submit_event("a", "n", 1, qos=1).result(20)
        assert len(broker.connections) == len(NO_CONNACK) + 2
        assert client.stats().connections == 2
    assert "internal error" not in caplog.text


@pytest.mark.parametrize("answer", list(NO_CONNACK))
def test_a_first_connection_without_a_proper_connack_is_a_connect_error(make_client, answer: str) -> None:
    """With the default protocol: MQTT 5 and 3.1.1 in turn. Nothing else escapes, and it says where."""
    with ScriptedBroker(NO_CONNACK[answer]) as broker:
        client = make_client(broker.url, connect_timeout=0.3)
        connect_error(client, f"127.0.0.1:{broker.port}")


# -- SUBACK -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", VERSIONS)
def test_every_refusal_of_a_subscription_is_told_to_who_asked_and_to_nobody_else(
    make_client, protocol: str
) -> None:
    codes = SUBACK_CODES[protocol]

    def code_of(name: str) -> list[int]:
        return [int(name, 16)] if name.startswith("0x") else [0]

    with ScriptedBroker(answer_subscribe(code_of)) as broker:
        client = make_client(broker.url, protocol=protocol)
        client.subscribe("good", print)
        client.connect()
        for code in codes:
            with pytest.raises(SubscribeError, match=f"'{code:#x}'") as caught:
                client.subscribe(f"{code:#x}", print)
            ((name, reason),) = caught.value.refused
            assert name == f"{code:#x}"
            assert reason
        client.subscribe("also good", print)
        assert client.stats().connections == 1


@pytest.mark.parametrize("protocol", VERSIONS)
def test_a_subscription_refused_at_a_reconnect_is_an_error_in_the_log_and_the_others_go_on(
    make_client, protocol: str, caplog
) -> None:
    """Somebody changed the rules of the broker. When they are changed back, the next reconnect has it again."""
    received: list[bytes] = []

    def serve_shortly(connection: ScriptedConnection) -> None:
        connection.accept()
        for _ in range(2):
            connection.answer(connection.expect(PacketType.SUBSCRIBE))

    def refuse_one(connection: ScriptedConnection) -> None:
        connection.accept()
        for _ in range(2):
            packet = connection.expect(PacketType.SUBSCRIBE)
            request = mqtt.read_subscribe(packet, connection.level)
            refused = request.filters[0][0] == "closed"
            connection.send(
                mqtt.suback(request.packet_id, [0x80 if refused else 1], level=connection.level),
                b"" if refused else mqtt.publish("open", b"x", level=connection.level),
            )
        eventually(lambda: received)

    with ScriptedBroker(serve_shortly, refuse_one, accept_and_serve) as broker:
        client = make_client(broker.url, protocol=protocol)
        client.subscribe("open", received.append, 1)
        client.subscribe("closed", print, 1)
        client.connect()
        broker.wait_for(PacketType.SUBSCRIBE, 6)
        eventually(lambda: client.connected and client.stats().connections == 3)
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "'closed'" in errors[0]


def test_a_suback_that_never_comes_ends_the_connection_and_not_the_service(make_client) -> None:
    """While subscriptions are restored: the next connection may have more luck."""
    with ScriptedBroker(answer_subscribe(lambda _: None), accept_and_serve) as broker:
        client = make_client(broker.url, connect_timeout=0.5)
        client.subscribe("a", print)
        client.connect(timeout=10)
        assert client.connected
        assert client.stats().connections == 2
        assert "did not acknowledge the subscriptions" in client.stats().last_error


def test_a_suback_that_never_comes_to_a_later_subscribe_is_an_error_for_it_alone(make_client) -> None:
    """The connection stays; and a SUBACK that comes when nobody waits any more does no harm."""
    requests: list[Packet] = []

    def script(connection: ScriptedConnection) -> None:
        def instead(packet: Packet) -> bool:
            if packet.type == PacketType.UNSUBSCRIBE:
                connection.send(mqtt.suback(requests[0].packet_id, [0], level=connection.level))
            elif packet.type == PacketType.SUBSCRIBE and not requests:
                requests.append(packet)
                return True
            return False

        connection.accept()
        connection.serve(instead)

    with ScriptedBroker(script) as broker:
        client = make_client(broker.url)
        client.connect()
        with pytest.raises(SubscribeError, match=r"did not answer the subscription 'slow' within 0\.2 s"):
            client.subscribe("slow", print, timeout=0.2)
        broker.wait_for(PacketType.UNSUBSCRIBE)
        client.subscribe("quick", print)
        assert client.stats().connections == 1


@pytest.mark.parametrize("protocol", VERSIONS)
def test_a_broker_that_hangs_up_on_subscribe_is_tried_again(make_client, protocol: str) -> None:
    def hang_up_on_subscribe(connection: ScriptedConnection) -> None:
        connection.accept()
        connection.expect(PacketType.SUBSCRIBE)

    with ScriptedBroker(hang_up_on_subscribe, hang_up_on_subscribe, accept_and_serve) as broker:
        client = make_client(broker.url, protocol=protocol)
        client.subscribe("a", print)
        client.connect()
        assert client.stats().connections == 3


def test_a_broker_that_always_hangs_up_on_subscribe_is_a_connect_error_and_no_storm(make_client) -> None:
    def hang_up_on_subscribe(connection: ScriptedConnection) -> None:
        connection.accept()
        connection.expect(PacketType.SUBSCRIBE)

    with ScriptedBroker(hang_up_on_subscribe) as broker:
        client = make_client(broker.url, reconnect_max_delay=30)
        client.subscribe("a", print)
        with pytest.raises(ConnectError, match="closed the connection"):
            client.connect(timeout=2.0)
        assert len(broker.connections) < 20


def test_a_subscribe_that_ends_the_connection_is_made_on_the_next_one(make_client) -> None:
    """Whoever waited is not kept waiting: it is registered, and the broker is asked again."""

    def hang_up_on_subscribe(connection: ScriptedConnection) -> None:
        connection.accept()
        connection.expect(PacketType.SUBSCRIBE)

    with ScriptedBroker(hang_up_on_subscribe, accept_and_serve) as broker:
        client = make_client(broker.url)
        client.connect()
        subscription = client.subscribe("a", print)
        assert subscription.active
        broker.wait_for(PacketType.SUBSCRIBE, 2)
        eventually(lambda: client.connected and client.stats().connections == 2)


SUBACKS: dict[str, Callable[[int, int], list[bytes]]] = {
    "twice": lambda number, level: [mqtt.suback(number, [0], level=level)] * 2,
    "of another packet first": lambda number, level: [
        mqtt.suback(number + 7, [0x80], level=level),
        mqtt.suback(number, [0], level=level),
    ],
    "with too many codes": lambda number, level: [mqtt.suback(number, [0, 0x80, 0x80], level=level)],
    "with a higher QoS than asked for": lambda number, level: [mqtt.suback(number, [2], level=level)],
    "of an UNSUBSCRIBE first": lambda number, level: [
        mqtt.unsuback(number, [0], level=level),
        mqtt.suback(number, [0], level=level),
    ],
}


@pytest.mark.parametrize("answer", list(SUBACKS))
@pytest.mark.parametrize("protocol", VERSIONS)
def test_subacks_that_break_the_rules_do_no_harm(make_client, protocol: str, answer: str) -> None:
    def script(connection: ScriptedConnection) -> None:
        def instead(packet: Packet) -> bool:
            if packet.type != PacketType.SUBSCRIBE:
                return False
            connection.send(*SUBACKS[answer](packet.packet_id, connection.level))
            return True

        connection.accept()
        connection.serve(instead)

    with ScriptedBroker(script) as broker:
        client = make_client(broker.url, protocol=protocol)
        client.subscribe("a", print)
        client.connect()
        client.subscribe("b", print)
        client.publish("c", b"fine", qos=1)
        assert client.stats().connections == 1
