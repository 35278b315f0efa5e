"""Connections that break: the next one comes by itself, with the subscriptions and with what waited."""

from __future__ import annotations

import logging
import re
import threading
import time

import pytest

from tars_mqtt import AckTimeoutError, ClosedError, ConnectionState, NotConnectedError
from tests.support import FaultProxy, PacketType, ScriptedBroker, accept_and_leave, eventually
from tests.support import packet as mqtt

# -- the broker goes away -----------------------------------------------------------------------


def test_a_killed_broker_is_found_again_and_the_subscriptions_are_restored(make_client, broker):
    """The broker kept nothing: every subscription is made again before the client counts as connected."""
    received = []
    client = make_client(broker.url)
    client.subscribe("a/#", received.append)
    client.connect()
    client.subscribe("b/+", received.append, 1)
    broker.kill()
    eventually(lambda: client.state is ConnectionState.RECONNECTING)
    broker.start()
    assert client.wait_connected(5)
    client.publish("a/1", b"one", qos=1)
    client.publish("b/1", b"two", qos=1)
    eventually(lambda: sorted(received) == [b"one", b"two"], message=lambda: str(received))
    assert client.stats().reconnects == 1


@pytest.mark.parametrize("qos", [1, 2])
def test_what_waited_during_the_outage_arrives_in_order(make_client, broker, qos):
    """The receipts are done when the broker that came back has the messages."""
    received = []
    client = make_client(broker.url)
    client.subscribe("a", received.append, 2)
    client.connect()
    broker.kill()
    eventually(lambda: not client.connected)
    receipts = [client.submit_event("a", "n", number, qos=qos) for number in range(50)]
    assert client.stats().queued == 50
    assert not any(receipt.done() for receipt in receipts)
    broker.start()
    for receipt in receipts:
        assert receipt.result(10) == receipt.envelope_id
    eventually(lambda: len(received) == 50)
    order = [int(re.search(rb'"data":(\d+)', payload)[1]) for payload in received]
    assert order == list(range(50))
    assert client.stats().queued == 0


def test_qos_0_during_an_outage_is_an_error_that_says_what_to_do(make_client, broker):
    """Nothing is dropped in silence."""
    client = make_client(broker.url)
    client.connect()
    broker.kill()
    eventually(lambda: not client.connected)
    for call in (
        lambda: client.publish_event("a", "b", 1),
        lambda: client.submit_event("a", "b", 1),
        lambda: client.publish("a", b"1"),
    ):
        with pytest.raises(NotConnectedError, match="qos=1"):
            call()
    assert client.stats().queued == 0


def test_a_wait_that_times_out_carries_the_receipt_and_the_message_still_goes_out(make_client, broker):
    client = make_client(broker.url)
    client.connect()
    broker.kill()
    eventually(lambda: not client.connected)
    with pytest.raises(AckTimeoutError, match="still on its way") as caught:
        client.publish_event("a", "b", 1, qos=1, timeout=0.1)
    receipt = caught.value.receipt
    assert not receipt.done()
    broker.start()
    assert receipt.result(10) == receipt.envelope_id


def test_an_outage_longer_than_the_connect_timeout_is_survived(make_client, broker):
    """From the first connection on it tries for ever."""
    client = make_client(broker.url, connect_timeout=0.3)
    client.connect()
    broker.kill()
    eventually(lambda: not client.connected)
    time.sleep(1.0)
    broker.start()
    assert client.wait_connected(5)


def test_a_message_that_the_broker_had_not_acknowledged_is_sent_again(make_client):
    """As a repetition, with its packet id, where the broker kept the session [MQTT-4.4.0-1]."""

    def swallow(connection) -> None:
        connection.accept()
        connection.expect(PacketType.PUBLISH)

    def resume(connection) -> None:
        connection.accept(session_present=True)
        connection.serve()

    with ScriptedBroker(swallow, resume) as broker:
        client = make_client(broker.url)
        client.connect()
        client.publish("a", b"once", qos=1, timeout=5)
        first, second = (mqtt.read_publish(packet, 5) for packet in broker.received(PacketType.PUBLISH))
        stats = client.stats()
        client.shutdown()
    assert (first.dup, second.dup) == (False, True)
    assert (first.packet_id, first.payload) == (second.packet_id, second.payload)
    assert stats.retried == 1


# -- the session --------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_resumed_session_needs_no_second_subscribe(make_client, make_broker, protocol):
    """The broker kept the subscriptions, over a restart as well, and what came for them meanwhile."""
    broker = make_broker(persistence=True)
    received = []
    client = make_client(broker.url, protocol=protocol)
    client.subscribe("a/#", received.append, 1)
    client.connect()
    broker.restart()
    eventually(lambda: client.stats().reconnects == 1 and client.connected)
    client.publish("a/1", b"after", qos=1)
    eventually(lambda: received == [b"after"])
    assert broker.log.count("Received SUBSCRIBE") == 1


def test_a_cut_connection_resumes_its_session(make_client, broker):
    """Without persistence as well: the broker is the same."""
    received = []
    with FaultProxy(broker.url) as proxy:
        client = make_client(proxy.url)
        client.subscribe("a/#", received.append, 1)
        client.connect()
        other = make_client(broker.url)
        other.connect()
        proxy.refuse()
        proxy.cut()
        eventually(lambda: not client.connected)
        other.publish("a/1", b"meanwhile", qos=1)
        assert received == []
        proxy.accept()
        eventually(lambda: received == [b"meanwhile"])
        client.shutdown()
    assert broker.log.count("Received SUBSCRIBE") == 1


def test_a_clean_session_subscribes_again(make_client, broker):
    received = []
    with FaultProxy(broker.url) as proxy:
        client = make_client(proxy.url, session_expiry=0)
        client.subscribe("a/#", received.append, 1)
        client.connect()
        proxy.cut()
        eventually(lambda: client.stats().reconnects == 1 and client.connected)
        client.publish("a/1", b"after", qos=1)
        eventually(lambda: received == [b"after"])
        client.shutdown()
    assert broker.log.count("Received SUBSCRIBE") == 2


def test_a_filter_unsubscribed_during_the_outage_is_not_restored(make_client, broker):
    client = make_client(broker.url)
    subscription = client.subscribe("gone/#", print, 1)
    client.subscribe("kept/#", print, 1)
    client.connect()
    broker.kill()
    eventually(lambda: not client.connected)
    subscription.unsubscribe()
    client.subscribe("new/#", print, 1)
    said = len(broker.log)
    broker.start()
    assert client.wait_connected(5)
    log = broker.log[said:]
    assert "gone/#" not in log
    assert "kept/# (QoS 1)" in log
    assert "new/# (QoS 1)" in log


# -- the ways in which a connection ends --------------------------------------------------------


@pytest.mark.parametrize("end", [FaultProxy.cut, FaultProxy.hang_up, FaultProxy.half_close])
def test_every_end_of_a_connection_is_noticed_at_once(make_client, broker, end):
    """RST, FIN, and FIN from the broker's side alone: no keepalive has to run out."""
    received = []
    with FaultProxy(broker.url) as proxy:
        client = make_client(proxy.url)
        client.subscribe("a", received.append)
        client.connect()
        end(proxy)
        eventually(lambda: client.stats().reconnects == 1 and client.connected)
        client.publish("a", b"still here", qos=1)
        eventually(lambda: received == [b"still here"])
        client.shutdown()


def test_a_message_cut_in_the_middle_arrives_whole_and_once(make_client, broker):
    """Half a packet is forgotten with its connection; the broker sends the message again."""
    received = []
    payload = bytes(range(256)) * 40
    with FaultProxy(broker.url) as proxy:
        client = make_client(proxy.url)
        client.subscribe("a", received.append, 1)
        client.connect()
        other = make_client(broker.url)
        other.connect()
        passed = proxy.bytes_passed["to_client"]
        proxy.cut_after(passed + 5000, "to_client")
        other.publish("a", payload, qos=1)
        eventually(lambda: client.stats().reconnects == 1)
        eventually(lambda: received == [payload])
        client.shutdown()


def test_a_broker_that_breaks_the_protocol_is_left_and_tried_again(make_client):
    def nonsense(connection) -> None:
        connection.accept()
        connection.send(b"\x30\xff\xff\xff\xff\xff")  # a length of five bytes
        connection.hold()

    def serve(connection) -> None:
        connection.accept()
        connection.serve()

    with ScriptedBroker(nonsense, serve) as broker:
        client = make_client(broker.url)
        client.connect()
        eventually(lambda: client.stats().reconnects == 1)
        assert "malformed" in client.stats().last_error
        client.shutdown()


def test_the_reason_that_the_broker_gives_is_in_the_log(make_client, caplog):
    """DISCONNECT of MQTT 5 says why."""
    shutting_down = 0x8B

    def leave(connection) -> None:
        connection.accept()
        connection.send(mqtt.disconnect(shutting_down))

    def serve(connection) -> None:
        connection.accept()
        connection.serve()

    with ScriptedBroker(leave, serve) as broker:
        client = make_client(broker.url)
        client.connect()
        eventually(lambda: client.stats().reconnects == 1)
        assert "server shutting down" in client.stats().last_error
        client.shutdown()
    assert [record for record in caplog.records if "server shutting down" in record.getMessage()]


def test_a_second_client_with_the_same_id_is_named_as_the_cause(make_client, caplog):
    """In those words; and the two do not take the broker from each other all day."""
    taken_over = 0x8E

    def take_over(connection) -> None:
        connection.accept()
        connection.send(mqtt.disconnect(taken_over))

    with ScriptedBroker(take_over) as broker:
        client = make_client(broker.url, "twin", reconnect_max_delay=30)
        client.connect()
        eventually(lambda: client.state is ConnectionState.RECONNECTING)
        time.sleep(0.5)  # the first delays of an ordinary outage are over by then
        assert len(broker.connections) == 1
        client.shutdown()
    (record,) = [record for record in caplog.records if "taken over by another client" in record.getMessage()]
    assert record.levelno == logging.WARNING
    assert "taken over by another client with the same id 'twin'" in record.getMessage()


def test_a_broker_that_hangs_up_again_and_again_raises_the_same_suspicion(make_client, broker, caplog):
    """Mosquitto 2.0, and every broker of MQTT 3.1.1, takes the connection away and does not say why."""
    first, second = make_client(broker.url, "twin"), make_client(broker.url, "twin")
    first.connect()
    second.connect()
    words = "taken over by another client with the same id 'twin'"
    eventually(lambda: words in caplog.text)


def test_one_hang_up_is_no_reason_for_suspicion(make_client, broker, caplog):
    client = make_client(broker.url)
    client.connect()
    broker.restart()
    eventually(lambda: client.stats().reconnects == 1)
    assert "taken over" not in caplog.text


def test_an_error_of_our_own_costs_one_connection_and_not_the_service(
    make_client, broker, monkeypatch, caplog
):
    """The network thread does not die of it; it says so, and connects again."""
    received = []
    client = make_client(broker.url)
    client.subscribe("a", received.append, 1)
    client.connect()
    with monkeypatch.context() as patch:
        patch.setattr("tars_mqtt._core.inbound.Inbound.on_publish", lambda *_: 1 / 0)
        client.submit_event("a", "b", 1, qos=1)
        eventually(lambda: client.state is ConnectionState.RECONNECTING)
    eventually(lambda: client.connected)
    client.publish("a", b"works", qos=1)
    eventually(lambda: b"works" in received)
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert errors[0].exc_info[0] is ZeroDivisionError


# -- how often it tries -------------------------------------------------------------------------


def test_delays_grow_from_the_shortest_to_the_longest_with_jitter(make_client, broker, caplog):
    """Full jitter: each is drawn from zero to a ceiling that doubles."""
    client = make_client(broker.url, reconnect_min_delay=0.1, reconnect_max_delay=0.5)
    client.connect()
    broker.kill()

    def attempts():
        return [record for record in caplog.records if hasattr(record, "attempt")]

    eventually(lambda: len(attempts()) >= 6)
    client.shutdown()
    assert all(record.levelno == logging.WARNING for record in attempts())
    assert [record.attempt for record in attempts()] == sorted({record.attempt for record in attempts()})
    for record in attempts():
        assert 0 <= record.delay <= min(0.5, 0.1 * 2 ** (record.attempt - 1))
    assert len({record.delay for record in attempts()}) > 3


# -- leaving on purpose -------------------------------------------------------------------------


def test_a_client_that_disconnected_stays_away_until_it_connects_again(make_client, broker):
    """Its subscriptions stay registered."""
    received = []
    client = make_client(broker.url, session_expiry=0)
    client.subscribe("a", received.append, 1)
    client.connect()
    client.disconnect()
    assert client.state is ConnectionState.DISCONNECTED
    eventually(lambda: "Received DISCONNECT" in broker.log)
    with pytest.raises(NotConnectedError, match=r"call connect\(\) first"):
        client.publish("a", b"lost", qos=1)
    assert broker.log.count("Sending CONNACK") == 1
    client.connect()
    client.publish("a", b"again", qos=1)
    eventually(lambda: received == [b"again"])


def test_what_was_queued_before_a_disconnect_goes_out_after_the_next_connect(make_client, broker):
    received = []
    client = make_client(broker.url)
    client.subscribe("a", received.append, 1)
    client.connect()
    broker.kill()
    eventually(lambda: not client.connected)
    receipts = [client.submit_event("a", "n", number, qos=1) for number in range(10)]
    client.disconnect()
    assert not any(receipt.done() for receipt in receipts)
    broker.start()
    client.connect()
    for receipt in receipts:
        receipt.result(10)
    eventually(lambda: len(received) == 10)


def test_disconnect_without_a_connection_does_nothing(make_client):
    client = make_client("mqtt://127.0.0.1")
    client.disconnect()
    client.disconnect()


def test_a_client_works_again_after_shutdown_and_connect(make_client, broker):
    received = []
    client = make_client(broker.url)
    client.subscribe("a", received.append, 1)
    for count in (1, 2, 3):
        client.connect()
        client.publish("a", b"%d" % count, qos=1)
        eventually(lambda: len(received) == count)  # noqa: B023
        client.shutdown()
        with pytest.raises(ClosedError, match=r"connect\(\)"):
            client.publish("a", b"no", qos=1)
    assert received == [b"1", b"2", b"3"]


# -- what an end may not cost -------------------------------------------------------------------


def test_an_unsubscribe_lost_with_the_connection_is_said_again(make_client, broker):
    """Or a shared subscription would go on drawing messages that nobody here handles."""
    others: list[bytes] = []
    with FaultProxy(broker.url) as proxy:
        client = make_client(proxy.url, session_expiry=60)
        client.connect()
        subscription = client.subscribe("$share/g/jobs", lambda payload: None, 1)
        other = make_client(broker.url)
        other.subscribe("$share/g/jobs", others.append, 1)
        other.connect()
        proxy.stall()
        subscription.unsubscribe(timeout=0.1)
        proxy.cut()
        proxy.resume()
        eventually(lambda: client.connected and client.stats().connections == 2)
        client.subscribe("later", lambda payload: None)  # its answer comes behind that to the UNSUBSCRIBE
        for number in range(10):
            other.publish("jobs", b"%d" % number, qos=1)
        eventually(lambda: len(others) == 10)


def test_who_subscribes_while_a_broker_does_not_answer_need_not_wait_for_it(make_client):
    """The connection may take long; what is registered by then is asked for on it."""

    def never_answer(connection) -> None:
        connection.expect(PacketType.CONNECT)
        connection.hold()

    with ScriptedBroker(accept_and_leave, never_answer) as broker:
        client = make_client(broker.url, protocol="5", connect_timeout=20.0)
        client.connect()
        eventually(lambda: len(broker.received(PacketType.CONNECT)) == 2)
        assert client.subscribe("a", lambda payload: None, timeout=5.0).active


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_broker_with_more_to_say_has_the_acknowledgements_of_a_client_that_leaves(
    make_client, make_broker, protocol
):
    """A socket that is closed while something comes is reset, with all that the broker had not read."""
    broker = make_broker(["max_queued_messages 0"])
    settings = {"client_id": "owner", "session_expiry": 60, "protocol": protocol, "max_pending": 20}
    handled: list[bytes] = []
    gate = threading.Event()

    def handle(payload: bytes) -> None:
        gate.wait(20)
        handled.append(payload)

    sender = make_client(broker.url)
    sender.connect()
    owner = make_client(broker.url, **settings)
    owner.subscribe("work", handle, 1)
    owner.connect()
    owner.shutdown()
    for number in range(200):
        sender.submit_event("work", "n", number, qos=1)
    eventually(lambda: sender.stats().acknowledged == 200)
    owner = make_client(broker.url, **settings)
    owner.subscribe("work", handle, 1)
    owner.connect()
    eventually(lambda: owner.stats().pending >= 20)
    threading.Timer(0.2, gate.set).start()
    owner.shutdown()
    heir = make_client(broker.url, **settings)
    heir.subscribe("work", handle, 1)
    heir.connect()
    eventually(lambda: len(set(handled)) == 200)
    assert len(handled) == 200


def test_a_connection_comes_about_though_handlers_are_behind(make_client, make_broker):
    """MQTT 3.1.1: what is not read for their sake may be the answer that the connection waits for."""
    broker = make_broker(["max_queued_messages 0"])
    settings = {"client_id": "owner", "session_expiry": 60, "protocol": "3.1.1", "max_pending": 20}
    release = threading.Event()
    sender = make_client(broker.url)
    sender.connect()
    with FaultProxy(broker.url) as proxy:
        proxy.latency(0.02)
        owner = make_client(proxy.url, **settings)
        owner.subscribe("work", lambda payload: None, 1)
        owner.connect()
        owner.shutdown()
        for number in range(60):
            sender.submit_event("work", "n", number, qos=1)
        eventually(lambda: sender.stats().acknowledged == 60)
        owner = make_client(proxy.url, connect_timeout=5.0, **settings)
        owner.subscribe("work", lambda payload: release.wait(20), 1)
        try:
            owner.connect(5)
        finally:
            release.set()
