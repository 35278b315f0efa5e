"""From the broker to the handlers and back: who gets what, in which order, and when it is acknowledged."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from tars_mqtt import (
    AckTimeoutError,
    EncodeError,
    Envelope,
    Message,
    MQTTClient,
    PublishRejectedError,
    QueueFullError,
    SubscribeError,
    TopicError,
    current_message,
)
from tars_mqtt._core import subscriber
from tests.support import PacketType, ScriptedBroker, eventually, numbers
from tests.support import packet as mqtt
from tests.support.program import Program

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support import Broker

VERSIONS = ("5", "3.1.1")


# -- who gets what --------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", VERSIONS)
def test_each_handler_is_called_once_also_when_filters_overlap(make_client, broker: Broker, protocol) -> None:
    heard: dict[str, list[bytes]] = {name: [] for name in ("a/b", "a/+", "a/#", "#", "+/b", "again")}
    client = make_client(broker.url, protocol=protocol)
    for name, payloads in heard.items():
        client.subscribe("a/+" if name == "again" else name, payloads.append, 1)
    client.connect()
    client.publish("a/b", b"one", qos=1)
    client.publish("a/c", b"two", qos=1)
    client.publish("a", b"three", qos=1)
    eventually(lambda: len(heard["#"]) == 3 and client.stats().pending == 0)
    assert heard["a/b"] == [b"one"]
    assert heard["a/+"] == heard["again"] == [b"one", b"two"]
    assert heard["a/#"] == [b"one", b"two", b"three"]
    assert heard["+/b"] == [b"one"]


@pytest.mark.parametrize("protocol", VERSIONS)
def test_a_wildcard_at_the_first_level_leaves_system_topics_alone(
    make_client, broker: Broker, protocol
) -> None:
    everything: list[Message] = []
    system: list[Message] = []

    def on_everything(message: Message) -> None:
        everything.append(message)

    def on_system(message: Message) -> None:
        system.append(message)

    client = make_client(broker.url, protocol=protocol)
    client.subscribe("#", on_everything)
    client.subscribe("$SYS/broker/version", on_system)
    client.connect()
    client.publish("a", b"")
    eventually(lambda: system and everything)
    assert {message.topic for message in everything} == {"a"}


def test_a_shared_subscription_divides_the_messages(make_client, broker: Broker) -> None:
    halves: list[list[bytes]] = [[], []]
    clients = [make_client(broker.url) for _ in halves]
    for client, half in zip(clients, halves, strict=True):
        client.subscribe("$share/group/work/#", half.append, 1)
        client.connect()
    for number in range(20):
        clients[0].publish("work/x", str(number), qos=1)
    eventually(lambda: len(halves[0]) + len(halves[1]) == 20)
    assert all(halves)
    assert sorted(int(payload) for half in halves for payload in half) == list(range(20))


def test_what_is_retained_comes_to_a_newcomer_and_not_again_to_the_others(
    make_client, broker: Broker, monkeypatch
) -> None:
    monkeypatch.setattr(subscriber, "_REPLAY_TIME", 0.0)
    first: list[bytes] = []
    second: list[bytes] = []
    client = make_client(broker.url)
    client.connect()
    client.publish("state", b"kept", qos=1, retain=True)
    client.subscribe("state", first.append, 1)
    eventually(lambda: first == [b"kept"])
    client.subscribe("state", second.append, 1)
    eventually(lambda: second == [b"kept"])
    client.publish("state", b"live", qos=1)
    eventually(lambda: second == [b"kept", b"live"] and first == [b"kept", b"live"])


def test_who_subscribes_right_after_another_takes_no_retained_messages_away(
    make_client, broker: Broker
) -> None:
    first: list[bytes] = []
    second: list[bytes] = []
    client = make_client(broker.url)
    client.connect()
    for number in range(200):
        client.publish(f"state/{number}", b"%d" % number, qos=1, retain=True)
    client.subscribe("state/#", first.append, 1)
    client.subscribe("state/#", second.append, 1)
    eventually(lambda: len(set(first)) == len(set(second)) == 200)


def test_after_unsubscribe_nobody_is_called(make_client, broker: Broker) -> None:
    stopped: list[bytes] = []
    others: list[bytes] = []
    client = make_client(broker.url)
    subscription = client.subscribe("a", stopped.append, 1)
    client.subscribe("a", others.append, 1)
    client.connect()
    client.publish("a", b"1", qos=1)
    eventually(lambda: stopped == others == [b"1"])
    subscription.unsubscribe()
    subscription.unsubscribe()
    client.publish("a", b"2", qos=1)
    eventually(lambda: others == [b"1", b"2"])
    assert stopped == [b"1"]
    assert not subscription.active


def test_what_is_unsubscribed_while_away_is_not_kept_by_the_broker(make_client, broker: Broker) -> None:
    """It would go on giving us our share of a group, and nobody would handle that."""
    received: list[bytes] = []
    other = make_client(broker.url)
    other.subscribe("$share/group/work", received.append, 1)
    other.connect()
    client = make_client(broker.url, "me")
    subscription = client.subscribe("$share/group/work", received.append, 1)
    client.connect()
    client.disconnect()
    subscription.unsubscribe()
    client.connect()
    eventually(lambda: "Received UNSUBSCRIBE from me" in broker.log)
    expected = [b"%d" % number for number in range(10)]
    for payload in expected:
        other.publish("work", payload, qos=1)
    eventually(lambda: received == expected)


def test_a_refused_subscription_raises_and_is_not_kept(make_client, make_broker, tmp_path) -> None:
    """In MQTT 5 mosquitto says why; the others are not touched."""
    rules = tmp_path / "acl"
    rules.write_text("topic readwrite open/#\n")
    rules.chmod(0o644)
    broker = make_broker([f"acl_file {rules}"])
    heard: list[bytes] = []
    client = make_client(broker.url)
    client.subscribe("open/#", heard.append, 1)
    client.connect()
    with pytest.raises(PublishRejectedError, match="not authorized|Not authorized"):
        client.publish("closed/x", b"", qos=1)
    client.publish("open/x", b"fine", qos=1)
    eventually(lambda: heard == [b"fine"])


def test_suback_failure_raises_naming_filter_and_reason(make_client) -> None:
    def refuse(connection) -> None:
        connection.accept()
        packet = connection.expect(PacketType.SUBSCRIBE)
        connection.send(mqtt.suback(packet.packet_id, [0x87], level=connection.level))
        connection.serve()

    with ScriptedBroker(refuse) as broker:
        client = make_client(broker.url)
        client.connect()
        with pytest.raises(SubscribeError, match=r"'no/entry'.*[Nn]ot authorized") as caught:
            client.subscribe("no/entry", print)
        assert caught.value.refused[0][0] == "no/entry"


# -- what a handler is given ------------------------------------------------------------------------


@attrs.frozen
class Reading:
    celsius: float


def test_the_annotation_decides_what_a_handler_gets(make_client, broker: Broker) -> None:
    got: dict[str, Any] = {}

    def plain(payload) -> None:
        got["plain"] = payload

    def raw(payload: bytes) -> None:
        got["raw"] = payload

    def message(message: Message) -> None:
        got["message"] = message

    def envelope(envelope: Envelope) -> None:
        got["envelope"] = envelope

    def model(reading: Reading) -> None:
        got["model"] = reading

    client = make_client(broker.url)
    for handler in (plain, raw, message, envelope, model):
        client.subscribe("a", handler, 1)
    client.connect()
    envelope_id = client.publish_event("a", "reading", {"celsius": 21.5}, qos=1, correlation_id="c")
    eventually(lambda: len(got) == 5)
    assert got["plain"] == got["raw"] == got["message"].payload
    assert (got["message"].topic, got["message"].qos, got["message"].retain) == ("a", 1, False)
    assert got["message"].envelope.id == got["envelope"].id == envelope_id
    assert got["model"] == Reading(21.5)


def test_a_typed_handler_never_sees_bad_data_and_the_service_goes_on(make_client, broker: Broker) -> None:
    """Hostile payloads of every kind, among good messages."""
    seen: list[Reading] = []

    def handler(reading: Reading) -> None:
        seen.append(reading)

    good = Envelope.new("r", {"celsius": 1.0}, source="s").to_bytes()
    hostile = [
        b"",
        b"[" * 100_000,
        b"1" * 100_000,
        os.urandom(10_000_000),
        good.replace(b"1.0", b'"\\ud800"'),
        good.replace(b"1.0", b"NaN"),
        good.replace(b'"type"', b'"kind"'),
        good.replace(b'"celsius"', b'"kelvin"'),
        good.replace(b"1.0", b'"hot"'),
        b"null",
        b"\xff" * 1000,
    ]
    client = make_client(broker.url)
    client.subscribe("a", handler, 1)
    client.connect()
    for payload in hostile:
        client.publish("a", payload, qos=1)
        client.publish("a", good, qos=1)
    eventually(lambda: len(seen) == len(hostile))
    assert client.stats().decode_failures == len(hostile)
    assert client.connected


def test_log_lines_of_a_handler_can_name_the_message(make_client, broker: Broker) -> None:
    seen: list[str | None] = []

    def handler(payload: bytes) -> None:
        message = current_message.get()
        seen.append(message and message.envelope.id)

    client = make_client(broker.url)
    client.subscribe("a", handler, 1)
    client.connect()
    envelope_id = client.publish_event("a", "n", 1, qos=1)
    eventually(lambda: seen == [envelope_id])


def test_a_handler_that_raises_is_logged_and_touches_nothing_else(
    make_client, broker: Broker, caplog
) -> None:
    seen: list[int] = []

    def handler(envelope: Envelope) -> None:
        seen.append(envelope.data)
        if envelope.data % 10 == 0:
            raise SystemExit("a handler ends itself, not the service")

    client = make_client(broker.url)
    client.subscribe("a", handler, 1)
    client.connect()
    for number in range(100):
        client.submit_event("a", "n", number, qos=1, correlation_id=f"c{number}")
    eventually(lambda: seen == list(range(100)))
    eventually(lambda: client.stats().handler_failures == 10)
    records = [record for record in caplog.records if record.name == "tars_mqtt.dispatch"]
    assert [record.correlation_id for record in records] == [f"c{number}" for number in range(0, 100, 10)]
    assert all(record.topic == "a" and len(record.envelope_id) == 32 for record in records)


# -- order and side by side -------------------------------------------------------------------------


def test_one_lane_is_in_order_and_a_slow_one_holds_nobody_up(make_client, broker: Broker) -> None:
    release = threading.Event()
    slow: list[bytes] = []
    quick: list[bytes] = []

    def crawl(payload: bytes) -> None:
        release.wait(20)
        slow.append(payload)

    client = make_client(broker.url, keepalive=1)
    client.subscribe("slow", crawl)
    client.subscribe("quick", quick.append)
    client.connect()
    for number in range(50):
        client.publish("slow", str(number))
        client.publish("quick", str(number))
    eventually(lambda: len(quick) == 50)
    time.sleep(1.6)  # longer than the watchdog's patience
    assert client.connected
    assert client.stats().connections == 1
    release.set()
    eventually(lambda: len(slow) == 50)
    assert slow == quick == [str(number).encode() for number in range(50)]


@pytest.mark.parametrize("order_by", [None, "topic", lambda message: message.topic])
def test_concurrency_runs_so_many_at_once_and_order_by_keeps_order_per_key(
    make_client, broker: Broker, order_by
) -> None:
    lock, running, most = threading.Lock(), 0, 0
    all_published = threading.Event()
    seen: dict[str, list[int]] = {"k/0": [], "k/1": [], "k/2": []}

    def handler(message: Message) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        all_published.wait(30)
        time.sleep(0.02)
        with lock:
            running -= 1
            seen[message.topic].append(int(message.payload))

    client = make_client(broker.url)
    client.subscribe("k/+", handler, 1, concurrency=3, order_by=order_by)
    client.connect()
    for number in range(8):
        for topic in seen:
            client.publish(topic, str(number), qos=1)
    eventually(lambda: running == 3)
    all_published.set()
    eventually(lambda: sum(map(len, seen.values())) == 24)
    assert most == 3
    if order_by is not None:
        assert all(order == list(range(8)) for order in seen.values())


def test_a_handler_may_call_everything_on_its_client(make_client, broker: Broker) -> None:
    """Calls that wait included: publishing with QoS 1, subscribing, unsubscribing."""
    answers: list[Any] = []
    client = make_client(broker.url, workers=1)

    def question(payload: bytes) -> None:
        second = client.subscribe("deeper", lambda payload: None, 1)
        client.publish_event("answers", "n", 1, qos=1)
        second.unsubscribe()

    client.subscribe("questions", question, 1)
    client.subscribe("answers", answers.append, 1)
    client.connect()
    client.publish("questions", b"", qos=1)
    eventually(lambda: answers)


# -- acknowledgements -------------------------------------------------------------------------------


def test_acknowledgements_come_after_the_handlers_and_in_order_of_arrival(make_client) -> None:
    """The second is handled first, and acknowledged second."""
    release = threading.Event()
    quick: list[bytes] = []

    def deliver(connection) -> None:
        connection.accept()
        for _ in range(2):
            connection.answer(connection.expect(PacketType.SUBSCRIBE))
        for packet_id, topic in ((7, "slow"), (8, "quick")):
            connection.send(mqtt.publish(topic, b"x", qos=1, packet_id=packet_id, level=connection.level))
        connection.serve()

    with ScriptedBroker(deliver) as broker:
        client = make_client(broker.url)
        client.subscribe("slow", lambda payload: release.wait(20), 1)
        client.subscribe("quick", quick.append, 1)
        client.connect()
        eventually(lambda: quick)
        assert broker.received(PacketType.PUBACK) == []
        release.set()
        acknowledged = broker.wait_for(PacketType.PUBACK, 2)
        assert [packet.packet_id for packet in acknowledged] == [7, 8]


@pytest.mark.parametrize("subscribe_first", [True, False])
def test_a_message_whose_process_was_killed_in_the_handler_comes_back(
    make_client, make_broker: Callable[..., Broker], subscribe_first: bool
) -> None:
    """Also to a process that subscribes after connecting, as most do."""
    broker = make_broker()
    source = """
from tars_mqtt import MQTTClient
import sys, time
client = MQTTClient(sys.argv[1], "victim")
def handler(payload):
    print("handling", payload.decode(), flush=True)
    time.sleep(60)
client.subscribe("work", handler, 1)
client.connect()
print("ready", flush=True)
time.sleep(60)
"""
    with Program(source, broker.url) as victim:
        victim.wait_for("ready")
        boss = make_client(broker.url)
        boss.connect()
        boss.publish("work", b"precious", qos=1)
        victim.wait_for("handling precious")
        victim.kill()
    again: list[bytes] = []
    heir = make_client(broker.url, client_id="victim")
    if subscribe_first:
        heir.subscribe("work", again.append, 1)
        heir.connect()
    else:
        heir.connect()
        heir.subscribe("work", again.append, 1)
    eventually(lambda: again == [b"precious"])


def test_qos_2_arrives_once(make_client, broker: Broker) -> None:
    received: list[bytes] = []
    client = make_client(broker.url)
    client.subscribe("a", received.append, 2)
    client.connect()
    for number in range(50):
        client.submit_event("a", "n", number, qos=2)
    eventually(lambda: len(received) == 50 and client.stats().inflight == 0)
    assert numbers(received) == list(range(50))


def test_nothing_accepted_is_lost_while_the_broker_is_away(
    make_client, make_broker: Callable[..., Broker]
) -> None:
    """A broker that keeps its sessions on disk, stopped for a while during traffic."""
    broker = make_broker(persistence=True)
    received: set[int] = set()
    listener = make_client(broker.url, client_id="listener")
    listener.subscribe("a", lambda payload: received.update(numbers([payload])), 1)
    listener.connect()
    client = make_client(broker.url, client_id="publisher")
    client.connect()
    receipts = []
    for number in range(300):
        receipts.append(client.submit_event("a", "n", number, qos=1))
        if number == 100:
            broker.terminate()
        if number == 250:
            broker.start()
        time.sleep(0.004)
    for receipt in receipts:
        receipt.result(15)
    eventually(lambda: received == set(range(300)))


# -- deduplication ----------------------------------------------------------------------------------


def test_each_subscription_sees_an_envelope_once(make_client, broker: Broker) -> None:
    first: list[bytes] = []
    second: list[bytes] = []
    client = make_client(broker.url, dedupe_ttl=60, dedupe_max_entries=100)
    client.subscribe("a", first.append, 1)
    client.subscribe("#", second.append, 1)
    client.connect()
    envelope = Envelope.new("n", 1, source="s").to_bytes()
    for _ in range(3):
        client.publish("a", envelope, qos=1)
    eventually(lambda: client.stats().duplicates == 4)
    assert first == second == [envelope]


def test_a_failed_handling_does_not_count_as_seen(make_client, broker: Broker) -> None:
    calls: list[int] = []

    def handler(payload: bytes) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("the first time")

    client = make_client(broker.url, dedupe_ttl=60, dedupe_max_entries=100)
    client.subscribe("a", handler, 1)
    client.connect()
    envelope = Envelope.new("n", 1, source="s").to_bytes()
    for _ in range(3):
        client.publish("a", envelope, qos=1)
    eventually(lambda: client.stats().duplicates == 1)
    assert len(calls) == 2


@pytest.mark.parametrize("late", ["succeeds", "fails"])
def test_what_outlived_a_shutdown_is_handled_again_and_leaves_that_alone(broker: Broker, late: str) -> None:
    """A redelivery is no duplicate of what may still fail; and how the old call ends changes nothing for it."""
    calls: list[int] = []
    began = threading.Semaphore(0)
    may_end = threading.Event(), threading.Event()

    def handler(payload: bytes) -> None:
        call = len(calls)
        calls.append(call)
        began.release()
        assert may_end[call].wait(30)
        if call == 0 and late == "fails":
            raise RuntimeError("too late")

    client = MQTTClient(broker.url, "me", dedupe_ttl=60, dedupe_max_entries=100, shutdown_timeout=0.2)
    client.subscribe("a", handler, 1)
    client.connect()
    old = set(threading.enumerate())
    envelope = Envelope.new("n", 1, source="s").to_bytes()
    client.publish("a", envelope, qos=1)
    assert began.acquire(timeout=10)
    (worker,) = (thread for thread in set(threading.enumerate()) - old if "worker" in thread.name)
    client.shutdown()
    client.connect()
    try:
        assert began.acquire(timeout=10), "it comes again, and is handled"
        may_end[0].set()
        worker.join(10)
        client.publish("a", envelope, qos=1)
        may_end[1].set()
        eventually(lambda: client.stats().duplicates == 1 and client.stats().pending == 0)
        assert len(calls) == 2
    finally:
        for event in may_end:
            event.set()
        client.shutdown(10)


def test_an_iterator_sees_an_id_once_as_well(make_client, shared_broker, unique):
    """A duplicate is counted and acknowledged; what comes behind it comes."""
    client = make_client(shared_broker.url, dedupe_ttl=60, dedupe_max_entries=100)
    client.connect()
    with client.messages(unique, 1) as messages:
        first, second = (Envelope.new("n", number, source="me").to_bytes() for number in (1, 2))
        for payload in (first, first, second):
            client.publish(unique, payload, qos=1)
        assert [messages.next(10).envelope.data for _ in range(2)] == [1, 2]
        with pytest.raises(TimeoutError):
            messages.next(0.1)
        assert client.stats().duplicates == 1
        assert client.stats().pending == 0


# -- publishing -------------------------------------------------------------------------------------


def test_a_wait_that_times_out_carries_a_receipt_that_comes_true(make_client, broker: Broker) -> None:
    client = make_client(broker.url)
    client.connect()
    broker.freeze()
    try:
        with pytest.raises(AckTimeoutError) as caught:
            client.publish_event("a", "n", 1, qos=1, timeout=0.2)
        assert not caught.value.receipt.done()
    finally:
        broker.thaw()
    eventually(lambda: caught.value.receipt.done())


def test_a_full_queue_waits_as_long_as_it_may_and_takes_nothing(make_client, broker: Broker) -> None:
    client = make_client(broker.url, max_queued=2)
    client.connect()
    broker.freeze()
    try:
        for number in range(2):
            client.submit_event("a", "n", number, qos=1)
        started = time.monotonic()
        with pytest.raises(QueueFullError):
            client.publish_event("a", "n", 2, qos=1, timeout=0.3)
        assert time.monotonic() - started >= 0.3
        assert client.stats().queued == 2
    finally:
        broker.thaw()


@pytest.mark.parametrize("protocol", VERSIONS)
def test_qos_0_stays_in_order_whether_it_goes_at_once_or_in_a_crowd(
    make_client, broker: Broker, protocol: str
) -> None:
    """Pauses of all lengths between the messages: some find the network thread asleep, some awake."""
    client = make_client(broker.url, protocol=protocol)
    received: list[bytes] = []
    client.subscribe("a/#", received.append)
    client.connect()
    for number in range(3_000):
        client.publish("a/b", b"%d" % number)
        if number % 3:
            time.sleep(random.choice((0, 0.00001, 0.0001, 0.0003)))
    eventually(lambda: len(received) == 3_000)
    assert received == [b"%d" % number for number in range(3_000)]
    at_once = client._engine.backlog.sent_at_once
    assert 100 < at_once < 3_000, "both ways were to be tried"
    assert client.stats().messages_out >= 3_000


@pytest.mark.parametrize(
    ("topic", "data", "error"),
    [
        ("", 1, TopicError),
        ("a/#", 1, TopicError),
        ("a/+/b", 1, TopicError),
        ("a\0b", 1, TopicError),
        ("x" * 65_536, 1, TopicError),
        (5, 1, TopicError),
        ("a", float("nan"), EncodeError),
        ("a", {"raw": b"x"}, EncodeError),
        ("a", object(), EncodeError),
    ],
)
def test_bad_input_is_refused_on_the_callers_line_and_nothing_is_sent(
    make_client, broker: Broker, topic, data, error
) -> None:
    client = make_client(broker.url)
    client.connect()
    for qos in (0, 1):
        with pytest.raises(error):
            client.publish_event(topic, "n", data, qos=qos)
        with pytest.raises(error):
            client.submit_event(topic, "n", data, qos=qos)
    stats = client.stats()
    assert (stats.messages_out, stats.queued) == (0, 0)


@pytest.mark.parametrize("bad", ["", "a/#/b", "a#", "a+/b", "$share/g", "$share//a", "$share/a+/b", "a\0"])
def test_a_malformed_filter_is_refused_and_nothing_is_remembered(make_client, broker: Broker, bad) -> None:
    client = make_client(broker.url)
    with pytest.raises(TopicError):
        client.subscribe(bad, print)
    client.connect()
    assert "SUBSCRIBE" not in broker.log


def test_a_coroutine_function_given_to_the_blocking_client_is_a_type_error() -> None:
    async def handler(payload: bytes) -> None:
        pass

    client = MQTTClient("mqtt://localhost:1", "c")
    with pytest.raises(TypeError, match=r"tars_mqtt\.aio"):
        client.subscribe("a", handler)


# -- iterating --------------------------------------------------------------------------------------


def test_messages_are_iterated_and_acknowledged_when_the_next_is_asked_for(make_client) -> None:
    def deliver(connection) -> None:
        connection.accept()
        connection.answer(connection.expect(PacketType.SUBSCRIBE))
        for packet_id in (1, 2):
            payload = str(packet_id).encode()
            connection.send(mqtt.publish("a", payload, qos=1, packet_id=packet_id, level=connection.level))
        connection.serve()

    with ScriptedBroker(deliver) as broker:
        client = make_client(broker.url)
        client.connect()
        messages = client.messages("a", 1)
        assert messages.next(5).payload == b"1"
        assert broker.received(PacketType.PUBACK) == []
        assert messages.next(5).payload == b"2"
        assert [packet.packet_id for packet in broker.wait_for(PacketType.PUBACK)] == [1]
        messages.close()
        broker.wait_for(PacketType.PUBACK, 2)


def test_an_iterator_that_is_left_half_way_is_closed(make_client, broker: Broker) -> None:
    """It would hold up the acknowledgements of all that comes after what it holds."""
    received: list[bytes] = []
    client = make_client(broker.url, "me")
    client.subscribe("b", received.append, 1)
    client.connect()
    client.publish("a", "kept", qos=1, retain=True)
    for _ in client.messages("a", 1):
        break

    def is_closed() -> bool:
        gc.collect()
        return client.stats().pending == 0

    eventually(is_closed)
    eventually(lambda: "Received UNSUBSCRIBE from me" in broker.log)
    client.publish("b", "next", qos=1)
    eventually(lambda: received and broker.log.count("Received PUBACK from me") == 2)


def test_a_time_that_is_none_is_refused_and_nothing_is_remembered(make_client, broker: Broker) -> None:
    client = make_client(broker.url)
    with pytest.raises(ValueError, match="timeout must be"):
        client.subscribe("a", print, timeout=-1)
    client.connect()
    assert "SUBSCRIBE" not in broker.log


def test_a_qos_may_be_written_as_a_float(make_client, broker: Broker) -> None:
    """As a settings file may have it; the network thread must not stumble over it."""
    received: list[bytes] = []
    client = make_client(broker.url)
    client.subscribe("a", received.append, 1.0)
    client.connect()
    client.publish("a", "x", qos=1.0)
    eventually(lambda: received == [b"x"])


def test_raw_bytes_are_submitted_without_waiting_for_the_broker(make_client, broker: Broker) -> None:
    received: list[Message] = []

    def handler(message: Message) -> None:
        received.append(message)

    client = make_client(broker.url)
    client.subscribe("a", handler, 1)
    client.connect()
    broker.freeze()
    receipt = client.submit("a", "tea", qos=1, properties={"content_type": "text/plain"})
    assert not receipt.done()
    broker.thaw()
    assert receipt.result(20) is None
    eventually(lambda: received)
    assert received[0].payload == b"tea"
    assert received[0].properties["content_type"] == "text/plain"
    assert client.submit("a", b"").done()
    with pytest.raises(TypeError, match="must be bytes or str"):
        client.submit("a", 5)
