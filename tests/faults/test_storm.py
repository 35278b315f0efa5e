"""Many clients at once, and two with the same name: they come back spread over time, and do not fight all day."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from tars_mqtt import MQTTClient
from tars_mqtt._core.backoff import Backoff
from tests.support import Broker, ScriptedBroker, accept_and_serve, eventually
from tests.support import packet as mqtt

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support import ScriptedConnection

FLEET = 200


def test_two_hundred_clients_come_back_spread_over_time(broker: Broker, monkeypatch, caplog) -> None:
    """Full jitter: nobody stays away, each draws for itself, and nobody comes before its time.

    When they come is the machine's business: one that is busy for a second is late for many at once.
    """
    caplog.set_level(logging.INFO, "tars_mqtt.session")
    drawn: dict[str, list[tuple[float, float]]] = defaultdict(list)
    draw = Backoff.next

    def draw_and_note(backoff: Backoff) -> float:
        delay = draw(backoff)
        drawn[threading.current_thread().name].append((time.time(), delay))
        return delay

    clients = [
        MQTTClient(
            broker.url,
            f"fleet-{number}",
            session_expiry=0,
            reconnect_min_delay=1.0,
            reconnect_max_delay=2.0,
            shutdown_timeout=5.0,
        )
        for number in range(FLEET)
    ]
    try:
        for client in clients:
            client.connect()
        monkeypatch.setattr(Backoff, "next", draw_and_note)
        broker.kill()
        broker.start()
        eventually(
            lambda: all(client.stats().connections == 2 and client.connected for client in clients), 30
        )
    finally:
        for client in clients:
            client._engine.life.call_off()
            client.disconnect()
        for client in clients:
            client.shutdown()
    came = {
        record.threadName: record.created
        for record in caplog.records
        if record.name == "tars_mqtt.session" and record.getMessage().startswith("connected to")
    }
    assert len(came) == len(drawn) == FLEET
    for name, draws in drawn.items():
        assert came[name] >= draws[0][0] + sum(delay for at, delay in draws if at < came[name]) - 0.05
    in_tenths = Counter(int(draws[0][1] * 10) for draws in drawn.values())
    assert len(in_tenths) == 10
    assert max(in_tenths.values()) < FLEET / 4, in_tenths


def test_two_clients_with_one_id_slow_down_and_say_why(make_client, broker: Broker, caplog) -> None:
    """Mosquitto throws the older one out without a word. What they publish arrives all the same."""
    twins = [make_client(broker.url, "twin", reconnect_max_delay=30) for _ in range(2)]
    for twin in twins:
        twin.connect()
    eventually(lambda: "taken over by another client with the same id 'twin'" in caplog.text)
    receipts = [twin.submit_event("a", "n", 1, qos=1) for twin in twins]
    for receipt in receipts:
        receipt.result(30)
    time.sleep(1.0)
    # The delays double: in that time, an undamped quarrel has thousands of rounds.
    assert sum(twin.stats().connections for twin in twins) < 60


def test_a_takeover_that_the_broker_names_is_answered_with_a_long_wait(make_client, caplog) -> None:
    """MQTT 5 has a reason for it; whoever of the two comes back at once would throw the other out again."""

    def take_over(connection: ScriptedConnection) -> None:
        connection.accept()
        connection.send(mqtt.disconnect(0x8E))

    with ScriptedBroker(take_over) as broker:
        client = make_client(broker.url, "twin", protocol="5", reconnect_max_delay=30)
        client.connect()
        receipt = client.submit_event("a", "n", 1, qos=1)
        eventually(lambda: "taken over by another client with the same id 'twin'" in caplog.text)
        time.sleep(1.0)
        assert len(broker.connections) == 1
        assert not receipt.done()


def test_a_broker_that_sends_everybody_away_gives_its_reason(make_client, at_once: None, caplog) -> None:
    """Server shutting down, busy, quota exceeded, administrative action and so on: we come back after each."""
    codes = [0x8B, 0x89, 0x97, 0x98, 0x9C, 0x9D, 0xA0]

    def leave(code: int) -> Callable[[ScriptedConnection], None]:
        def script(connection: ScriptedConnection) -> None:
            connection.accept()
            connection.send(mqtt.disconnect(code))

        return script

    with ScriptedBroker(*map(leave, codes), accept_and_serve) as broker:
        client = make_client(broker.url, protocol="5")
        client.connect()
        client.submit_event("a", "n", 1, qos=1).result(20)
        assert client.stats().connections == len(codes) + 1
    assert caplog.text.count("the broker ended the connection: ") >= len(codes)
