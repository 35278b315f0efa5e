"""Which version of MQTT is spoken, and what a broker's answer to CONNECT means."""

from __future__ import annotations

import time

import pytest

from tars_mqtt import ConnectError, ConnectRefusedError
from tests.support import PacketType, ScriptedBroker, accept_and_leave, accept_and_serve, eventually
from tests.support import packet as mqtt
from tests.support.packet import Property
from tests.support.wait import connect_error

V311, V5 = mqtt.V311, mqtt.V5

UNSUPPORTED = 0x84
UNSUPPORTED_311 = 0x01


def refuse(code: int):
    return lambda connection: connection.accept(code)


def levels(broker) -> list[int]:
    """The version of each CONNECT so far."""
    return [mqtt.read_connect(packet).level for packet in broker.received(PacketType.CONNECT)]


# -- brokers that do not speak MQTT 5 -----------------------------------------------------------


def refuse_as_5(connection) -> None:
    """As the standard wants it of a broker that knows MQTT 5 exists."""
    connection.accept(UNSUPPORTED)


def refuse_as_311(connection) -> None:
    """In the form of MQTT 3.1.1, as amqtt does."""
    connection.expect(PacketType.CONNECT)
    connection.send(mqtt.connack(UNSUPPORTED_311, level=V311))


def hang_up(connection) -> None:
    connection.expect(PacketType.CONNECT)


def reset(connection) -> None:
    connection.expect(PacketType.CONNECT)
    connection.reset()


def never_answer(connection) -> None:
    """As RabbitMQ 3.10 does."""
    connection.expect(PacketType.CONNECT)
    connection.hold()


REFUSALS = [refuse_as_5, refuse_as_311, hang_up, reset, never_answer]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_auto_falls_back_to_311_within_the_connect_timeout_and_remembers_it(make_client, refusal):
    """One connect() is enough; a reconnect does not ask for MQTT 5 again."""

    def serve_shortly(connection) -> None:
        connection.accept()
        connection.answer(connection.expect(PacketType.SUBSCRIBE))

    with ScriptedBroker(refusal, serve_shortly, accept_and_serve) as broker:
        client = make_client(broker.url, connect_timeout=2.0)
        client.subscribe("a/#", print)
        client.connect()
        eventually(lambda: client.stats().reconnects == 1 and client.connected)
        assert levels(broker) == [V5, V311, V311]
        client.shutdown()


def test_what_auto_found_out_outlives_a_shutdown(make_client):
    with ScriptedBroker(refuse_as_5, accept_and_serve) as broker:
        client = make_client(broker.url)
        for _ in range(2):
            client.connect()
            client.shutdown()
        assert levels(broker) == [V5, V311, V311]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_auto_finds_out_again_when_the_broker_was_replaced_by_an_older_one(make_client, refusal):
    """A service is not restarted because its broker was."""
    with ScriptedBroker(accept_and_leave, refusal, refusal, accept_and_serve) as broker:
        client = make_client(broker.url, connect_timeout=0.6)
        client.connect()
        eventually(lambda: client.stats().reconnects == 1 and client.connected)
        assert levels(broker) == [V5, V5, V5, V311]
        client.shutdown()


def test_auto_that_nobody_answers_is_a_connect_error_with_the_reason(make_client):
    with ScriptedBroker(never_answer) as broker:
        client = make_client(broker.url, connect_timeout=0.4)
        started = time.monotonic()
        with pytest.raises(ConnectError, match="did not answer"):
            client.connect(timeout=1.5)
        assert time.monotonic() - started < 3.5
        assert levels(broker)[:2] == [V5, V311]


def test_a_wrong_password_is_no_reason_to_try_another_version(make_client):
    with ScriptedBroker(refuse(0x86)) as broker:
        client = make_client(broker.url)
        with pytest.raises(ConnectRefusedError):
            client.connect()
        assert levels(broker) == [V5]


# -- one version on purpose ---------------------------------------------------------------------


@pytest.mark.parametrize(("protocol", "spoken"), [("auto", "p5"), ("5", "p5"), ("3.1.1", "p2")])
def test_a_real_broker_hears_the_version_of_the_settings(make_client, broker, protocol, spoken):
    received = []
    client = make_client(broker.url, "me", protocol=protocol)
    client.subscribe("a", received.append, 2)
    client.connect()
    for qos in (0, 1, 2):
        client.publish("a", b"%d" % qos, qos=qos)
    eventually(lambda: sorted(received) == [b"0", b"1", b"2"])
    assert f"as me ({spoken}, c0, k60)" in broker.log
    assert broker.log.count("Sending CONNACK") == 1


@pytest.mark.parametrize("refusal", REFUSALS)
def test_protocol_5_is_never_anything_else(make_client, refusal):
    with ScriptedBroker(refusal) as broker:
        client = make_client(broker.url, protocol="5", connect_timeout=0.3)
        with pytest.raises(ConnectError):
            client.connect(timeout=2)
        assert set(levels(broker)) == {V5}


def test_a_refused_version_says_so(make_client):
    with ScriptedBroker(refuse_as_5) as broker:
        client = make_client(broker.url, protocol="5")
        connect_error(client, "does not speak this version of MQTT")


def test_protocol_311_is_never_anything_else(make_client):
    with ScriptedBroker(hang_up) as broker:
        client = make_client(broker.url, protocol="3.1.1")
        with pytest.raises(ConnectError):
            client.connect(timeout=2)
        assert set(levels(broker)) == {V311}


def test_subscriptions_have_identifiers_where_the_broker_takes_them(make_client):
    """MQTT 5 only, and not where the CONNACK says that there are none."""
    without = {Property.SUBSCRIPTION_IDENTIFIER_AVAILABLE: 0}
    cases = [("5", {}, True), ("5", without, False), ("3.1.1", {}, False)]
    for protocol, properties, expected in cases:

        def script(connection, properties=properties) -> None:
            connection.accept(properties=properties)
            connection.serve()

        with ScriptedBroker(script) as broker:
            client = make_client(broker.url, protocol=protocol)
            client.subscribe("a", print)
            client.connect()
            (packet,) = broker.received(PacketType.SUBSCRIBE)
            request = mqtt.read_subscribe(packet, V5 if protocol == "5" else V311)
            assert (Property.SUBSCRIPTION_IDENTIFIER in request.properties) is expected
            client.shutdown()


# -- what a refusal means -----------------------------------------------------------------------

CURABLE = [
    (V5, 0x80, "unspecified error"),
    (V5, 0x81, "malformed packet"),
    (V5, 0x82, "protocol error"),
    (V5, 0x83, "implementation specific error"),
    (V5, 0x88, "server unavailable"),
    (V5, 0x89, "server busy"),
    (V5, 0x97, "quota exceeded"),
    (V5, 0x9C, "use another server"),
    (V5, 0x9F, "connection rate exceeded"),
    (V311, 3, "server unavailable"),
]

FINAL = [
    (V5, 0x85, "client identifier not valid"),
    (V5, 0x86, "bad user name or password"),
    (V5, 0x87, "not authorized"),
    (V5, 0x8A, "banned"),
    (V5, 0x8C, "bad authentication method"),
    (V5, 0x90, "topic name invalid"),
    (V5, 0x95, "packet too large"),
    (V5, 0x99, "payload format invalid"),
    (V5, 0x9A, "retain not supported"),
    (V5, 0x9B, "qos not supported"),
    (V5, 0x9D, "server moved"),
    (V311, 2, "client identifier not valid"),
    (V311, 4, "bad user name or password"),
    (V311, 5, "not authorized"),
]


@pytest.mark.parametrize(("level", "code", "reason"), CURABLE)
def test_a_refusal_that_may_pass_is_tried_again(make_client, caplog, level, code, reason):
    with ScriptedBroker(refuse(code), accept_and_serve) as broker:
        client = make_client(broker.url, protocol="5" if level == V5 else "3.1.1")
        client.connect()
        client.shutdown()
        assert levels(broker) == [level] * 2
    assert f"refused the connection: {reason}" in caplog.text


@pytest.mark.parametrize(("level", "code", "reason"), FINAL)
def test_a_refusal_that_stays_is_an_error_at_once(make_client, level, code, reason):
    with ScriptedBroker(refuse(code)) as broker:
        client = make_client(broker.url, protocol="5" if level == V5 else "3.1.1")
        started = time.monotonic()
        with pytest.raises(ConnectRefusedError) as caught:
            client.connect(timeout=20)
        assert time.monotonic() - started < 5.0
        assert len(broker.connections) == 1
    error = caught.value
    assert (error.code, error.reason, error.retriable) == (code, reason, False)
    assert reason in str(error)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_code_that_the_standard_does_not_have_is_a_connect_error(make_client, protocol):
    with ScriptedBroker(refuse(0x7B)) as broker:
        client = make_client(broker.url, protocol=protocol)
        with pytest.raises(ConnectError):
            client.connect(timeout=0.3)
