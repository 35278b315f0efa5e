"""What a client tells about itself: log records, the context of a handler, and counters."""

from __future__ import annotations

import logging
import threading

import attrs
import pytest

from tars_mqtt import (
    ConnectError,
    ConnectRefusedError,
    Envelope,
    EnvelopeLogFilter,
    Message,
    MQTTClientConfig,
    PublishRejectedError,
    QueueFullError,
    current_message,
)
from tests.support import FaultProxy, PacketType, ScriptedBroker, eventually
from tests.support import packet as mqtt
from tests.support.port import HOST, free_port

NOT_AUTHORISED = 0x87

DOCUMENTED_FIELDS = {
    "client_id",
    "topic",
    "event_type",
    "envelope_id",
    "correlation_id",
    "qos",
    "attempt",
    "delay",
}
PLAIN_FIELDS = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}


def ours(caplog) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name.startswith("tars_mqtt")]


def fail(payload) -> None:
    raise LookupError("mine")


# -- log records --------------------------------------------------------------------------------


def test_state_changes_are_infos_and_losses_are_warnings(make_client, broker, caplog):
    caplog.set_level(logging.INFO, "tars_mqtt")
    client = make_client(broker.url)
    client.connect()
    broker.restart()
    eventually(lambda: client.stats().reconnects == 1)
    assert client.wait_connected(10)
    client.shutdown()
    story = [(record.levelname, record.getMessage()) for record in ours(caplog)]
    levels = {message.split(" to ")[0].split(":")[0]: level for level, message in story}
    assert levels["connected"] == "INFO"
    assert levels["connection lost"] == "WARNING"
    assert levels["disconnected"] == "INFO"
    assert levels["shut down"] == "INFO"
    assert broker.url in caplog.text
    assert {record.name for record in ours(caplog)} == {"tars_mqtt.session"}


def test_an_ordinary_life_logs_nothing_above_info(make_client, broker, caplog):
    client = make_client(broker.url, enable_health=True, enable_heartbeat=True)
    client.subscribe("a", lambda _: None, 2)
    client.connect()
    for qos in (0, 1, 2):
        client.publish_event("a", "b", {"n": qos}, qos=qos)
    eventually(lambda: client.stats().handled == 3)
    client.disconnect()
    client.connect()
    client.shutdown()
    assert ours(caplog) == []


def test_every_message_is_a_debug_record_with_its_fields(make_client, broker, caplog):
    caplog.set_level(logging.DEBUG, "tars_mqtt")
    client = make_client(broker.url)
    client.subscribe("a", lambda _: None, 1)
    client.connect()
    envelope_id = client.publish_event("a", "user.login", {"n": 1}, correlation_id="c-1", qos=1)
    eventually(lambda: client.stats().handled == 1)
    for name in ("tars_mqtt.publish", "tars_mqtt.dispatch"):
        (record,) = [record for record in ours(caplog) if record.name == name]
        assert record.levelno == logging.DEBUG
        assert (record.client_id, record.topic, record.qos) == (client.config.client_id, "a", 1)
        assert (record.event_type, record.envelope_id) == ("user.login", envelope_id)
        assert record.correlation_id == "c-1"


def test_a_failed_handler_is_an_error_with_the_message_it_failed_on(make_client, broker, caplog):
    client = make_client(broker.url)
    client.subscribe("a", fail)
    client.connect()
    envelope_id = client.publish_event("a", "user.login", {}, correlation_id="c-1")
    eventually(lambda: client.stats().handler_failures == 1)
    (record,) = ours(caplog)
    assert (record.name, record.levelname) == ("tars_mqtt.dispatch", "ERROR")
    assert (record.topic, record.envelope_id, record.correlation_id) == ("a", envelope_id, "c-1")
    assert (record.event_type, record.qos, record.client_id) == ("user.login", 0, client.config.client_id)
    assert record.exc_info[0] is LookupError
    assert "fail" in record.getMessage()


def trouble(make_client, broker, secret: str):
    """A client that goes through everything that is logged; *secret* is in its payloads."""
    with FaultProxy(broker.url) as proxy:
        url = proxy.url.replace("://", f"://me:{secret}@")
        client = make_client(
            url,
            source_name="sensor",
            enable_health=True,
            enable_heartbeat=True,
            dedupe_ttl=60,
            dedupe_max_entries=10,
            max_queued=5,
        )
        client.client.enable_logger(logging.getLogger("paho"))
        client.subscribe("a", fail, 1)
        client.subscribe("a", lambda message: None, 1)

        @client.on("a", qos=1)
        def wants_an_envelope(envelope: Envelope) -> None:
            """Is given none: most payloads here are not what it asks for."""

        client.connect()
        client.client.enable_logger(logging.getLogger("paho"))
        client.publish("a", secret, qos=1)
        client.publish("a", f'{{"id": "{secret}", "type": 3}}', qos=2)
        client.publish("nobody/is/here", secret)
        payload = Envelope.new("secret.kept", {"password": secret}, source="me").to_bytes()
        for _ in range(2):
            client.publish("a", payload, qos=1)
        client.publish_health(False, "degraded")
        eventually(lambda: client.stats().handler_failures >= 3 and client.stats().duplicates)
        proxy.refuse()
        proxy.cut()
        eventually(lambda: not client.connected)
        while client.stats().queued < 5:
            client.submit_event("a", "secret.kept", {"password": secret}, qos=1)
        with pytest.raises(QueueFullError) as full:
            client.submit_event("a", "secret.kept", {"password": secret}, qos=1, timeout=0)
        assert secret not in f"{full.value} {full.value!r}"
        proxy.accept()
        eventually(lambda: client.connected and not client.stats().queued)
        proxy.refuse()
        proxy.cut()
        eventually(lambda: not client.connected)
        client.submit_event("a", "secret.kept", secret, qos=1)
        assert secret not in f"{client!r} {client.stats()!r} {client.config!r}"
        client.shutdown(timeout=0.2)
    return client


def test_no_payload_and_no_password_is_ever_logged(make_client, make_broker, caplog):
    """Not at DEBUG level, not with paho's own logger, not in a field, not in a traceback."""
    caplog.set_level(logging.DEBUG)
    secret = "hunter2-s3cret"
    trouble(make_client, make_broker(users={"me": secret}), secret)
    formatter = logging.Formatter()
    assert {"tars_mqtt.session", "tars_mqtt.dispatch", "paho"} <= {record.name for record in caplog.records}
    for record in caplog.records:
        assert secret not in formatter.format(record)
        assert secret not in repr(record.__dict__), record


def test_every_record_says_which_client_and_has_documented_fields_only(make_client, make_broker, caplog):
    caplog.set_level(logging.DEBUG, "tars_mqtt")
    client = trouble(make_client, make_broker(users={"me": "pw"}), "pw")
    assert {record.name for record in ours(caplog)} == {
        "tars_mqtt.session",
        "tars_mqtt.publish",
        "tars_mqtt.dispatch",
    }
    for record in ours(caplog):
        fields = set(record.__dict__) - PLAIN_FIELDS
        assert fields <= DOCUMENTED_FIELDS, record
        assert record.client_id == client.config.client_id, record


def test_a_refused_password_is_in_no_error(make_client, make_broker, caplog):
    caplog.set_level(logging.DEBUG)
    broker = make_broker(users={"me": "right"})
    client = make_client(broker.url.replace("://", "://me:wr0ng-pass@"))
    with pytest.raises(ConnectRefusedError) as caught:
        client.connect()
    told = f"{caught.value} {caught.value!r} {client!r} {client.config!r} {caplog.text}"
    assert "me:***@" in told
    assert "wr0ng-pass" not in told


def test_an_unreachable_url_is_told_without_its_password(make_client, caplog):
    client = make_client(f"mqtt://me:s3cret-pass@{HOST}:{free_port()}")
    with pytest.raises(ConnectError) as caught:
        client.connect(timeout=0.2)
    told = f"{caught.value} {client.stats().last_error} {caplog.text}"
    assert "me:***@" in told
    assert "s3cret-pass" not in told


def test_a_client_from_the_environment_keeps_its_password_to_itself(monkeypatch):
    monkeypatch.setenv("MQTT_URL", "mqtt://me:s3cret-pass@broker")
    monkeypatch.setenv("MQTT_CLIENT_ID", "me")
    assert "s3cret-pass" not in repr(MQTTClientConfig.from_env())


# -- the context of a handler -------------------------------------------------------------------


def test_the_log_lines_of_a_handler_carry_its_envelope_id(make_client, broker, caplog):
    """Without the handler's doing, also from what it calls."""
    caplog.handler.addFilter(EnvelopeLogFilter())
    logger = logging.getLogger("the.service")

    def handler(payload) -> None:
        logger.warning("busy")

    client = make_client(broker.url)
    client.subscribe("a", handler, 1)
    client.connect()
    ids = [client.publish_event("a", "b", n, correlation_id=f"c-{n}", qos=1) for n in range(3)]
    eventually(lambda: client.stats().handled == 3)
    caplog.handler.filters.clear()
    records = [record for record in caplog.records if record.name == "the.service"]
    assert [record.envelope_id for record in records] == ids
    assert [record.correlation_id for record in records] == ["c-0", "c-1", "c-2"]
    assert {record.topic for record in records} == {"a"}


def test_handlers_side_by_side_have_each_their_own_context(make_client, broker):
    barrier = threading.Barrier(3, timeout=5)
    seen = []

    def handler(message: Message) -> None:
        barrier.wait()
        seen.append((message, current_message.get()))

    client = make_client(broker.url)
    client.subscribe("a/#", handler, 1, concurrency=3)
    client.connect()
    for number in range(3):
        client.publish(f"a/{number}", b"", qos=1)
    eventually(lambda: len(seen) == 3)
    assert all(message is current for message, current in seen)
    assert current_message.get() is None


# -- counters -----------------------------------------------------------------------------------


def test_counters_of_the_way_out_and_in(make_client, broker):
    client = make_client(broker.url)
    assert client.stats().connections == client.stats().bytes_in == client.stats().bytes_out == 0
    client.subscribe("a", lambda _: None, 2)
    client.connect()
    for qos in (0, 1, 2):
        client.publish("a", b"x" * 1000, qos=qos)
    client.publish("b", b"", qos=1)
    eventually(lambda: client.stats().handled == 3)
    stats = client.stats()
    assert (stats.messages_out, stats.acknowledged, stats.messages_in) == (4, 3, 3)
    assert (stats.connections, stats.reconnects, stats.retried, stats.rejected) == (1, 0, 0, 0)
    assert (stats.queued, stats.queued_bytes, stats.inflight, stats.pending) == (0, 0, 0, 0)
    assert 3000 < stats.bytes_out < 3500
    assert 3000 < stats.bytes_in < 3500
    assert stats.dropped == {}
    assert stats.last_error is None


def test_counters_of_what_handlers_make_of_it(make_client, broker):
    @attrs.define
    class Reading:
        value: float

    def wants_a_reading(reading: Reading) -> None:
        assert reading.value == 1.5

    wants_a_reading.__annotations__["reading"] = Reading  # a local class is not found by its name
    client = make_client(broker.url, dedupe_ttl=60, dedupe_max_entries=100)
    client.subscribe("bad", fail)
    client.subscribe("reading", wants_a_reading)
    client.connect()
    client.publish("bad", b"")
    client.publish_event("reading", "r", {"value": 1.5})
    client.publish_event("reading", "r", {"value": "much"})
    again = Envelope.new("r", {"value": 1.5}, source="me").to_bytes()
    for _ in range(3):
        client.publish("reading", again)
    client.publish("reading", b"noise")
    eventually(lambda: client.stats().messages_in == 7 and not client.stats().pending)
    stats = client.stats()
    assert (stats.handled, stats.handler_failures) == (2, 1)
    assert (stats.decode_failures, stats.duplicates) == (2, 2)


def test_counters_of_an_outage(make_client, broker, caplog):
    client = make_client(broker.url)
    client.connect()
    broker.kill()
    eventually(lambda: "connection lost: the broker closed the connection" in caplog.text)
    eventually(lambda: "connection refused" in client.stats().last_error)
    receipts = [client.submit_event("abc", "n", number, qos=1) for number in range(3)]
    stats = client.stats()
    assert (stats.queued, stats.inflight, stats.connections) == (3, 0, 1)
    assert stats.queued_bytes > 3 * len("abc")
    broker.start()
    for receipt in receipts:
        receipt.result(10)
    stats = client.stats()
    assert (stats.queued, stats.queued_bytes) == (0, 0)
    assert (stats.connections, stats.reconnects, stats.acknowledged) == (2, 1, 3)


def test_what_the_broker_has_not_acknowledged_is_in_flight(make_client):
    release = threading.Event()

    def script(connection) -> None:
        connection.accept()
        packets = [connection.expect(PacketType.PUBLISH) for _ in range(2)]
        release.wait(10)
        for packet in packets:
            connection.answer(packet)
        connection.serve()

    with ScriptedBroker(script) as broker:
        client = make_client(broker.url, max_inflight=2)
        client.connect()
        receipts = [client.submit_event("a", "n", number, qos=1) for number in range(5)]
        eventually(lambda: client.stats().inflight == 2)
        assert client.stats().queued == 5
        release.set()
        for receipt in receipts:
            receipt.result(5)
        assert client.stats().inflight == client.stats().queued == 0
        client.shutdown()


def test_what_waits_for_a_handler_is_pending(make_client, broker):
    release = threading.Event()
    client = make_client(broker.url)
    client.subscribe("a", lambda _: release.wait(10), 1)
    client.connect()
    for _ in range(5):
        client.publish("a", b"", qos=1)
    eventually(lambda: client.stats().pending == 5)
    assert client.stats().handled == 0
    release.set()
    eventually(lambda: client.stats().handled == 5)
    eventually(lambda: client.stats().pending == 0)


def test_a_rejected_message_is_counted_logged_and_told(make_client, caplog):
    """PUBACK of MQTT 5 can say no."""

    def script(connection) -> None:
        connection.accept()
        packet = connection.expect(PacketType.PUBLISH)
        identifier = mqtt.read_publish(packet, connection.level).packet_id
        connection.send(mqtt.puback(identifier, NOT_AUTHORISED))
        connection.serve()

    with ScriptedBroker(script) as broker:
        client = make_client(broker.url)
        client.connect()
        with pytest.raises(PublishRejectedError) as caught:
            client.publish_event("secret", "b", None, qos=1)
        assert caught.value.code == NOT_AUTHORISED
        assert caught.value.reason.lower() == "not authorized"
        stats = client.stats()
        assert (stats.rejected, stats.acknowledged, stats.queued) == (1, 0, 0)
        client.shutdown()
    (record,) = [record for record in ours(caplog) if record.name == "tars_mqtt.publish"]
    assert (record.levelname, record.topic, record.qos) == ("WARNING", "secret", 1)


def test_stats_are_a_snapshot(make_client, broker):
    client = make_client(broker.url)
    before = client.stats()
    client.connect()
    assert before.connections == 0
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        before.connections = 5
