"""Handlers that raise anything, hang, and fail for ever: threads live on, and so do the others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from typing import TYPE_CHECKING

import attrs
import pytest

from tars_mqtt import Envelope
from tests.support import Broker, PacketType, ScriptedBroker, eventually, numbers
from tests.support import packet as mqtt

if TYPE_CHECKING:
    from tests.support import ScriptedConnection


class Catastrophe(BaseException):
    """No Exception: what ``except Exception`` does not catch."""


@pytest.mark.parametrize(
    "kind",
    [
        SystemExit,
        KeyboardInterrupt,
        GeneratorExit,
        Catastrophe,
        asyncio.CancelledError,
    ],
)
def test_whatever_a_handler_raises_ends_with_it(make_client, broker: Broker, kind, caplog) -> None:
    """Every worker has it once, and then handles the next message; other subscriptions do not notice."""
    seen: list[int] = []
    others: list[bytes] = []

    def handler(envelope: Envelope) -> None:
        seen.append(envelope.data)
        if envelope.data < 8:
            raise kind("no more")

    async def coroutine(envelope: Envelope) -> None:
        handler(envelope)

    client = make_client(broker.url, workers=2)
    client.subscribe("a", coroutine if make_client.colour == "aio" else handler, 1)
    client.subscribe("b", others.append, 1)
    client.connect()
    for number in range(16):
        client.submit_event("a", "n", number, qos=1)
        client.submit_event("b", "n", number, qos=1)
    eventually(lambda: seen == list(range(16)) and numbers(others) == list(range(16)))
    eventually(lambda: client.stats().handler_failures == 8)
    assert client.stats().connections == 1
    records = [record for record in caplog.records if record.name == "tars_mqtt.dispatch"]
    assert len(records) == 8
    assert {record.levelno for record in records} == {logging.ERROR}
    assert "internal error" not in caplog.text


def test_a_handler_that_raises_100_of_1000_times_sees_all_and_acknowledgements_keep_their_order(
    make_client,
) -> None:
    """Three subscriptions side by side, one failing, one slow, one quick."""
    seen: list[int] = []
    topics = ("a", "b", "c")

    def failing(envelope: Envelope) -> None:
        seen.append(envelope.data)
        if envelope.data % 10 == 0:
            raise RuntimeError("every tenth")

    def slow(envelope: Envelope) -> None:
        if envelope.data % 100 == 0:
            time.sleep(0.01)
        seen.append(envelope.data)

    def script(connection: ScriptedConnection) -> None:
        connection.accept()
        for _ in topics:
            connection.answer(connection.expect(PacketType.SUBSCRIBE))
        for number in range(3000):
            event = Envelope.new("n", number // 3, source="s").to_bytes()
            topic = topics[number % 3]
            connection.send(mqtt.publish(topic, event, qos=1, packet_id=number + 1, level=connection.level))
        connection.serve()

    with ScriptedBroker(script) as broker:
        client = make_client(broker.url)
        client.subscribe("a", failing, 1)
        client.subscribe("b", slow, 1)
        client.subscribe("c", lambda payload: seen.append(numbers([payload])[0]), 1)
        client.connect()
        acknowledged = broker.wait_for(PacketType.PUBACK, 3000, timeout=30)
        assert [packet.packet_id for packet in acknowledged] == list(range(1, 3001))
        assert sorted(seen) == sorted(3 * list(range(1000)))
        assert client.stats().handler_failures == 100


def test_retries_and_dead_letters_hold_up_no_other_lane(make_client, broker: Broker, monkeypatch) -> None:
    """One subscription fails for ever and retries; the other has its messages while the first one waits."""
    attempts: list[int] = []
    others: list[bytes] = []
    dead: list[bytes] = []

    def failing(envelope: Envelope) -> None:
        attempts.append(envelope.data)
        raise RuntimeError("never")

    client = make_client(broker.url, workers=1)
    client.subscribe("a", failing, 1, retries=2, retry_delay=0.05, dead_letter="dead/{topic}")
    client.subscribe("b", others.append, 1)
    client.subscribe("dead/#", dead.append, 1)
    client.connect()
    timer = getattr(client, "unwrapped", client)._engine.dispatcher.timer
    call_later, retries = timer.call_later, []
    monkeypatch.setattr(timer, "call_later", lambda *call: retries.append(call))  # however long it is
    for number in range(2):
        client.submit_event("a", "n", number, qos=1)
    eventually(lambda: attempts)
    for number in range(50):
        client.submit_event("b", "n", number, qos=1)
    eventually(lambda: len(others) == 50)
    assert attempts == [0], "the other lane was done before the first retry"
    monkeypatch.undo()
    for call in retries:
        call_later(*call)
    eventually(lambda: len(dead) == 2)
    assert attempts == [0, 0, 0, 1, 1, 1]
    eventually(lambda: client.stats().dead_letters == 2)


def test_a_dead_letter_waits_out_an_outage_and_its_message_is_not_acknowledged_before(make_client) -> None:
    """The broker hangs up on the dead letter: the message is still its own, and comes again; nothing is lost."""
    event = Envelope.new("n", 1, source="s").to_bytes()
    calls: list[bytes] = []

    def failing(payload: bytes) -> None:
        calls.append(payload)
        raise RuntimeError("never")

    def first(connection: ScriptedConnection) -> None:
        connection.accept()
        connection.answer(connection.expect(PacketType.SUBSCRIBE))
        connection.send(mqtt.publish("a", event, qos=1, packet_id=7, level=connection.level))
        assert connection.expect(PacketType.PUBLISH)

    def second(connection: ScriptedConnection) -> None:
        connection.accept(session_present=True)
        connection.send(mqtt.publish("a", event, qos=1, packet_id=7, dup=True, level=connection.level))
        connection.serve()

    with ScriptedBroker(first, second) as broker:
        client = make_client(broker.url)
        client.subscribe("a", failing, 1, dead_letter="dead")
        client.connect()
        (acknowledged,) = broker.wait_for(PacketType.PUBACK)
        assert acknowledged.packet_id == 7
        packets = [packet.type for packet in broker.connections[1].packets]
        assert packets.index(PacketType.PUBLISH) < packets.index(PacketType.PUBACK)
        assert calls == [event]


def test_a_stuck_handler_is_reported_and_everything_else_goes_on(make_client, broker: Broker, caplog) -> None:
    """Its message fails after its time; a warning names it; publishing, other handlers and the connection go on."""
    release = threading.Event()
    stuck: list[int] = []
    others: list[bytes] = []

    def handler(envelope: Envelope) -> None:
        stuck.append(envelope.data)
        if envelope.data == 0:
            release.wait(20)

    client = make_client(broker.url, keepalive=1, workers=1)
    client.subscribe("a", handler, 1, handler_timeout=0.3)
    client.subscribe("b", others.append, 1)
    client.connect()
    try:
        client.submit_event("a", "n", 0, qos=1)
        eventually(lambda: stuck == [0])
        client.submit_event("a", "n", 1, qos=1)
        client.submit_event("b", "n", 2, qos=1)
        eventually(lambda: stuck == [0, 1] and numbers(others) == [2])
        client.publish_event("c", "n", 3, qos=1)
        eventually(lambda: client.stats().handler_timeouts == 1)
        (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert "did not return within 0.3 s" in warning.getMessage()
        assert client.stats().connections == 1
    finally:
        release.set()


def test_a_handler_that_fails_after_its_time_was_up_does_not_let_a_repetition_run_beside_its_retry(
    make_client, broker: Broker
) -> None:
    """The retry has claimed the event by then; and one call fails once."""
    may_fail, may_return = threading.Event(), threading.Event()
    calls: list[int] = []

    def handler(envelope: Envelope) -> None:
        calls.append(envelope.data)
        if len(calls) == 1:
            may_fail.wait(30)
            raise RuntimeError("late")
        may_return.wait(30)

    client = make_client(broker.url, dedupe_ttl=60, dedupe_max_entries=10)
    client.subscribe("a", handler, 1, handler_timeout=0.2, retries=1, retry_delay=1.0, concurrency=2)
    client.connect()
    engine = getattr(client, "unwrapped", client)._engine
    event = Envelope.new("n", 1, source="s").to_bytes()
    with contextlib.ExitStack() as released:
        released.callback(may_return.set)
        released.callback(may_fail.set)
        client.publish("a", event, qos=1)
        eventually(lambda: client.stats().handler_timeouts == 1)
        (registration,) = engine._registry.registrations()
        registration.consumer.recovery = attrs.evolve(registration.consumer.recovery, timeout=None)
        eventually(lambda: len(calls) == 2)
        may_fail.set()
        eventually(lambda: not engine.dispatcher._stuck)
        client.publish("a", event, qos=1)
        eventually(lambda: client.stats().duplicates == 1)
    eventually(lambda: client.stats().pending == 0)
    assert calls == [1, 1]
    assert (client.stats().handler_timeouts, client.stats().handler_failures) == (1, 0)


@pytest.mark.parametrize("order_by", [None, "topic"])
@pytest.mark.parametrize("retries", [0, 1])
def test_a_handler_whose_task_is_cancelled_is_called_again_and_its_lane_goes_on(
    make_aio_client, broker: Broker, order_by, retries: int
) -> None:
    """By itself or by somebody who cancels every task there is: what is left of the burst has another task."""
    seen: list[int] = []

    async def handler(envelope: Envelope) -> None:
        seen.append(envelope.data)
        if envelope.data % 10 == 9 and seen.count(envelope.data) == 1:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)

    client = make_aio_client(broker.url, "me")
    client.subscribe("a", handler, 1, order_by=order_by, retries=retries, retry_delay=0.01)
    client.connect()
    for number in range(100):
        client.submit_event("a", "n", number, qos=1)
    eventually(lambda: broker.log.count("Received PUBACK from me") == 100)
    assert list(dict.fromkeys(seen)) == list(range(100))
    assert len(seen) == 100 + 10, "without a retry, too"
    assert client.stats().handler_failures == 10


def test_a_coroutine_that_swallows_its_cancellation_is_stuck_and_its_lane_goes_on(
    make_aio_client, broker: Broker, caplog
) -> None:
    """The time limit cancels it; where that is no use, it is reported as a thread would be, and left behind."""
    release = threading.Event()
    seen: list[int] = []
    health: list[str] = []

    async def handler(envelope: Envelope) -> None:
        seen.append(envelope.data)
        while envelope.data == 0 and not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)

    client = make_aio_client(broker.url, source_name="me", enable_health=True)
    client.subscribe(
        "system/health/me", lambda payload: health.append(Envelope.from_bytes(payload).data["event"]), 1
    )
    client.subscribe("a", handler, 1, handler_timeout=0.2)
    client.connect()
    try:
        for number in range(3):
            client.publish_event("a", "n", number, qos=1)
        eventually(lambda: seen == [0, 1, 2] and health[-1] == "handler_timeout")
        assert client.stats().handler_timeouts == 1
    finally:
        release.set()
    eventually(lambda: health[-1] == "handler_returned" and client.stats().pending == 0)
    assert seen == [0, 1, 2]
    assert caplog.text.count("did not return within 0.2 s") == 1


def test_a_handler_that_blocks_for_longer_than_the_keepalive_costs_nothing(
    make_client, broker: Broker
) -> None:
    """Other handlers, and publishes that are acknowledged, go on all the while; and it was no failure."""
    done: list[bytes] = []
    others: list[bytes] = []

    def slow(payload: bytes) -> None:
        time.sleep(3.0)
        done.append(payload)

    client = make_client(broker.url, keepalive=1)
    client.subscribe("a", slow, 1)
    client.subscribe("b", others.append, 1)
    client.connect()
    client.submit_event("a", "n", 0, qos=1)
    sent = 0
    while not done:
        client.publish_event("b", "n", sent, qos=1)
        sent += 1
        time.sleep(0.05)
    eventually(lambda: numbers(others) == list(range(sent)))
    assert sent > 10
    assert (client.stats().connections, client.stats().handler_failures) == (1, 0)


def test_failing_handlers_and_a_failing_network_at_once_lose_nothing(make_client, network) -> None:
    """Retried over reconnects, each event is handled in the end, and in the order of its lane."""
    handled: list[int] = []
    failed: set[int] = set()

    def handler(envelope: Envelope) -> None:
        if envelope.data % 3 == 0 and envelope.data not in failed:
            failed.add(envelope.data)
            raise RuntimeError("the first time")
        handled.append(envelope.data)

    listener = make_client(network.url)
    listener.subscribe("a", handler, 1, retries=3, retry_delay=0.02)
    listener.connect()
    publisher = make_client(network.url)
    publisher.connect()
    receipts = []
    for number in range(60):
        receipts.append(publisher.submit_event("a", "n", number, qos=1))
        if number % 20 == 10:
            network.cut()
    for receipt in receipts:
        receipt.result(20)
    eventually(lambda: set(handled) == set(range(60)))
    assert list(dict.fromkeys(handled)) == list(range(60))


def test_wall_clocks_that_jump_change_nothing(make_client, broker: Broker, monkeypatch) -> None:
    """A day ahead, and a day back, while messages, retries and deduplication are under way."""
    real, offsets = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + offsets[-1])
    calls: list[int] = []

    def handler(envelope: Envelope) -> None:
        calls.append(envelope.data)
        if calls.count(envelope.data) == 1:
            raise RuntimeError("the first time")

    client = make_client(broker.url, keepalive=1, dedupe_ttl=60, dedupe_max_entries=10)
    client.subscribe("a", handler, 1, retries=1, retry_delay=0.1)
    client.connect()
    event = Envelope.new("n", 1, source="s").to_bytes()
    for offset in (86_400.0, -86_400.0, 0.0):
        offsets.append(offset)
        client.publish("a", event, qos=1)
        eventually(lambda: calls == [1, 1])
    time.sleep(1.0)
    eventually(lambda: client.stats().duplicates == 2)
    assert client.stats().connections == 1
