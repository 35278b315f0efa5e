"""Health, heartbeat and last will, as somebody else sees them."""

from __future__ import annotations

import json
import threading
import time

import pytest

from tars_mqtt import NotConnectedError
from tests.support import (
    FaultProxy,
    PacketType,
    ScriptedBroker,
    ScriptedConnection,
    accept_and_serve,
    eventually,
)
from tests.support import packet as mqtt
from tests.support.observer import Observer
from tests.support.program import Program
from tests.support.thread import in_thread

HEALTH = "system/health/sensor"
HEARTBEAT = "system/keepalive/sensor"

READY, RECONNECTED = (True, "ready"), (True, "reconnected")
SHUTDOWN, CONNECTION_LOST = (False, "shutdown"), (False, "connection_lost")


@pytest.fixture
def observer(broker):
    with Observer(broker.host, broker.port, "system/#") as observer:
        yield observer


def events(observer: Observer) -> list[tuple[bool, str | None]]:
    """What the health messages said so far, in short."""
    return [(seen.data["ok"], seen.data.get("event")) for seen in observer.on(HEALTH)]


def last_event(observer: Observer) -> tuple[bool, str | None] | None:
    return events(observer)[-1] if events(observer) else None


def retained_state(broker, topic: str = HEALTH) -> dict:
    """The state that the broker keeps for whoever asks later."""
    with Observer(broker.host, broker.port, topic) as late:
        return late.wait_for(topic)[0].data


# -- health -------------------------------------------------------------------------------------


def test_a_service_is_ready_then_reconnected_then_shut_down(make_client, broker, observer):
    with FaultProxy(broker.url) as proxy:
        client = make_client(proxy.url, "sensor-7", "sensor", enable_health=True)
        client.connect()
        eventually(lambda: events(observer) == [READY] and client.stats().acknowledged == 1)
        proxy.cut()
        eventually(lambda: last_event(observer) == RECONNECTED)
        client.shutdown()
        eventually(lambda: last_event(observer) == SHUTDOWN)
    # In between the broker publishes the will of the connection that was cut.
    assert [event for event in events(observer) if event != CONNECTION_LOST] == [READY, RECONNECTED, SHUTDOWN]


def test_a_connection_that_did_not_last_was_not_ready(make_client):
    """The first that the world hears of a service is that it is ready, however often it tried."""

    def hangs_up(connection: ScriptedConnection) -> None:
        connection.accept()
        connection.expect(PacketType.SUBSCRIBE)
        connection.close()

    with ScriptedBroker(hangs_up, accept_and_serve) as broker:
        client = make_client(broker.url, enable_health=True)
        client.subscribe("a", print)
        client.connect()
        (packet,) = broker.wait_for(PacketType.PUBLISH)
        assert json.loads(mqtt.read_publish(packet, mqtt.V5).payload)["data"]["event"] == "ready"


def test_the_health_message_is_retained_and_says_who_when_and_what(make_client, broker, observer):
    before = time.time()
    client = make_client(broker.url, "sensor-7", "sensor", enable_health=True)
    client.connect()
    (seen,) = observer.wait_for(HEALTH)
    assert (seen.qos, seen.retain) == (1, True)
    assert (seen.envelope["type"], seen.envelope["source"]) == ("health.status", "sensor")
    assert seen.data.keys() == {"ok", "event", "timestamp"}
    assert before - 1 <= seen.data["timestamp"] <= time.time() + 1
    assert retained_state(broker) == seen.data


def test_without_source_name_the_client_id_names_the_service(make_client, broker, observer):
    client = make_client(broker.url, "sensor-7", enable_health=True)
    client.connect()
    observer.wait_for("system/health/sensor-7")


def test_ready_comes_after_the_subscriptions_are_acknowledged(make_client):
    """Who sees a service ready can send it work."""
    with ScriptedBroker(accept_and_serve) as broker:
        client = make_client(broker.url, enable_health=True)
        client.subscribe("work/#", print, 1)
        client.connect()
        broker.wait_for(PacketType.PUBLISH)
        client.shutdown()
        kinds = [packet.type for packet in broker.packets]
    assert kinds.index(PacketType.SUBSCRIBE) < kinds.index(PacketType.PUBLISH)


def test_reconnected_goes_out_ahead_of_what_waited(make_client):
    """Whoever watches the service need not wait for its backlog."""

    def end(connection) -> None:
        connection.accept()
        connection.answer(connection.expect(PacketType.PUBLISH))

    def serve_later(connection) -> None:
        assert submitted.wait(30)
        accept_and_serve(connection)

    submitted = threading.Event()
    with ScriptedBroker(end, serve_later) as broker:
        client = make_client(broker.url, "sensor", enable_health=True, connect_timeout=60)
        client.connect()
        eventually(lambda: not client.connected)
        client.submit_event("a", "waited", None, qos=1)
        submitted.set()
        packets = broker.wait_for(PacketType.PUBLISH, 3)
        client.shutdown()
    assert [mqtt.read_publish(packet, mqtt.V5).topic for packet in packets[:3]] == [HEALTH, HEALTH, "a"]


def test_publish_health_replaces_the_retained_state(make_client, broker):
    client = make_client(broker.url, "sensor", enable_health=True)
    client.connect()
    client.publish_health(False, "degraded", "the disk is full")
    state = retained_state(broker)
    assert (state["ok"], state["event"], state["error"]) == (False, "degraded", "the disk is full")
    client.publish_health(True)
    assert retained_state(broker).keys() == {"ok", "timestamp"}


def test_publish_health_without_enable_health_does_nothing_and_says_so_once(
    make_client, broker, observer, caplog
):
    client = make_client(broker.url, "sensor")
    client.connect()
    for _ in range(3):
        client.publish_health(True, "fine")
    client.publish("system/last", b"", qos=1)
    observer.wait_for("system/last")
    assert events(observer) == []
    (record,) = [record for record in caplog.records if record.name == "tars_mqtt.health"]
    assert record.levelname == "WARNING"
    assert "enable_health is off" in record.getMessage()
    assert record.client_id == "sensor"


def test_publish_health_before_connect_says_what_to_do(make_client):
    client = make_client("mqtt://127.0.0.1", enable_health=True)
    with pytest.raises(NotConnectedError, match=r"call connect\(\) first"):
        client.publish_health(True)


def test_a_state_published_during_an_outage_arrives_after_it_and_stays(make_client, broker):
    """The service's own word is newer than that it has reconnected."""
    client = make_client(broker.url, "sensor", enable_health=True, keepalive=1)
    client.connect()
    eventually(lambda: client.stats().acknowledged == 1)
    broker.kill()
    eventually(lambda: not client.connected)
    publishing = in_thread(client.publish_health, False, "degraded")
    eventually(lambda: client.stats().queued == 1)
    broker.start()
    publishing.result(10)
    assert retained_state(broker)["event"] == "degraded"
    time.sleep(1.8)  # past the repetition after 1.5 keepalives
    assert retained_state(broker)["event"] == "degraded"


def test_what_the_service_says_is_wrong_is_wrong_after_a_reconnect_too(make_client, broker, observer):
    """Until it says otherwise."""
    degraded = (False, "degraded")
    with FaultProxy(broker.url) as proxy:
        client = make_client(proxy.url, "sensor", enable_health=True, keepalive=1)
        client.subscribe("a", lambda payload: None, 1)
        client.connect()
        client.publish_health(False, "degraded", "the disk is full")
        proxy.cut()
        eventually(lambda: last_event(observer) == degraded and RECONNECTED in events(observer))
        time.sleep(1.8)  # past the repetition after 1.5 keepalives
        assert [event for event in events(observer) if event != CONNECTION_LOST][:4] == [
            READY,
            degraded,
            RECONNECTED,
            degraded,
        ]
        assert last_event(observer) == degraded
        assert retained_state(broker)["error"] == "the disk is full"
        client.publish_health(True, "mended")
        proxy.cut()
        eventually(lambda: last_event(observer) == RECONNECTED)
        client.shutdown()


def test_a_disconnect_on_purpose_is_published_too(make_client, broker):
    """Left alone, the retained state would go on saying that the service is up."""
    client = make_client(broker.url, "sensor", enable_health=True)
    client.connect()
    client.disconnect()
    state = retained_state(broker)
    assert (state["ok"], state["event"]) == (False, "disconnected")
    client.connect()
    eventually(lambda: retained_state(broker)["ok"])


def test_a_goodbye_that_follows_at_once_is_not_overtaken_by_the_greeting(make_client, broker, monkeypatch):
    client = make_client(broker.url, "sensor", enable_health=True)
    engine = getattr(client, "unwrapped", client)._engine
    pump, may_send = engine._outbound.pump, threading.Event()

    def hold_back(*args):
        return may_send.is_set() and pump(*args)

    monkeypatch.setattr(engine._outbound, "pump", hold_back)
    client.connect()
    leaving = in_thread(client.disconnect)
    eventually(lambda: client.stats().queued == 2)
    may_send.set()
    engine._session.transport.wake()
    leaving.result(30)
    assert retained_state(broker)["event"] == "disconnected"


# -- the last will ------------------------------------------------------------------------------


def test_the_will_says_connection_lost_and_is_retained(make_client):
    with ScriptedBroker(accept_and_serve) as broker:
        client = make_client(broker.url, source_name="sensor", enable_health=True)
        client.connect()
        will = mqtt.read_connect(broker.received(PacketType.CONNECT)[0]).will
        client.shutdown()
    assert (will.topic, will.qos, will.retain) == (HEALTH, 1, True)
    envelope = json.loads(will.payload)
    assert (envelope["type"], envelope["source"]) == ("health.status", "sensor")
    assert (envelope["data"]["ok"], envelope["data"]["event"]) == (False, "connection_lost")


SERVICE = """
    from tests.support.colour import ClientMaker

    client = ClientMaker(sys.argv[1])(sys.argv[2], "sensor", enable_health=True, keepalive=2)
    client.connect()
    say("ready")
    time.sleep(60)
"""


def test_a_killed_process_is_seen_as_unhealthy(make_client, broker, observer):
    """kill -9: nobody says goodbye, and the retained state says so within 1.5 keepalives."""
    with Program(SERVICE, make_client.colour, broker.url) as service:
        service.wait_for("ready")
        eventually(lambda: events(observer) == [READY])
        service.kill()
        eventually(lambda: events(observer) == [READY, CONNECTION_LOST], 3.0 + 1.5)
    state = retained_state(broker)
    assert (state["ok"], state["event"]) == (False, "connection_lost")


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_will_that_was_set_through_paho_holds_on_every_connection(make_client, broker, protocol):
    """Without health, which has one of its own."""
    seen: list[bytes] = []
    observer = make_client(broker.url, "observer")
    observer.subscribe("lamp/status", seen.append, 1)
    observer.connect()
    with FaultProxy(broker.url) as proxy:
        client = make_client(proxy.url, "lamp", protocol=protocol)
        client.client.will_set("lamp/status", "offline", 1, True)
        client.connect()
        for lost in (1, 2):
            proxy.cut()
            eventually(lambda lost=lost: seen == [b"offline"] * lost)
            eventually(lambda lost=lost: client.stats().connections == lost + 1)
        client.shutdown()
    observer.publish("lamp/status", b"asked", qos=1)
    eventually(lambda: seen == [b"offline"] * 2 + [b"asked"])


def test_the_will_of_an_old_connection_does_not_leave_a_live_service_marked_dead(
    make_client, broker, observer
):
    """A broker may give up the old connection late, when the new one is there: the service speaks up again.

    Here the observer publishes the late will, as it was in the CONNECT.
    """
    with FaultProxy(broker.url, record=True) as proxy:
        client = make_client(proxy.url, "sensor", enable_health=True, keepalive=1)
        client.connect()
        eventually(lambda: client.stats().acknowledged == 1)
        will = mqtt.read_connect(proxy.packets("to_broker", 0)[0]).will
        proxy.cut()
        eventually(lambda: last_event(observer) == RECONNECTED)
        observer.publish(will.topic, will.payload, retain=True)
        eventually(lambda: last_event(observer) == CONNECTION_LOST)
        eventually(lambda: last_event(observer) == RECONNECTED, 1.5 + 1.5, lambda: str(events(observer)))
        assert retained_state(broker)["ok"] is True
        client.shutdown()


# -- heartbeat ----------------------------------------------------------------------------------


def test_heartbeats_come_at_their_interval_and_are_not_retained(make_client, broker, observer):
    client = make_client(broker.url, "sensor-7", "sensor", enable_heartbeat=True, heartbeat_interval=1.0)
    client.connect()
    started = time.monotonic()
    seen = observer.wait_for(HEARTBEAT, 2)[0]
    assert 1.8 < time.monotonic() - started < 2.0 + 1.5
    assert (seen.qos, seen.retain) == (0, False)
    assert (seen.envelope["type"], seen.envelope["source"]) == ("health.heartbeat", "sensor")
    assert (seen.data["ok"], seen.data["event"]) == (True, "heartbeat")
    assert abs(seen.data["timestamp"] - time.time()) < 5
    assert seen.data.keys() == {"ok", "event", "timestamp"}
    assert events(observer) == []


def test_without_heartbeat_there_is_none(make_client, broker, observer):
    client = make_client(broker.url, "sensor", enable_health=True, heartbeat_interval=1.0)
    client.connect()
    time.sleep(1.3)
    assert observer.on(HEARTBEAT) == []


def test_heartbeats_missed_during_an_outage_are_not_caught_up(make_client, broker):
    """After a pause there is one, not one for each that was missed."""
    with FaultProxy(broker.url) as proxy:
        client = make_client(proxy.url, "sensor", enable_heartbeat=True, heartbeat_interval=1.0)
        client.connect()
        proxy.refuse()
        proxy.cut()
        time.sleep(1.5)
        with Observer(broker.host, broker.port, HEARTBEAT) as observer:
            proxy.accept()
            assert client.wait_connected(5)
            observer.wait_for(HEARTBEAT)
            time.sleep(0.3)
            assert len(observer.on(HEARTBEAT)) == 1
        client.shutdown()
