"""The way in: which subscriptions a message goes to, and when it is acknowledged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tars_mqtt._core import inbound as inbound_module
from tars_mqtt._core import property as property_module
from tars_mqtt._core import wire
from tars_mqtt._core.dispatch import Consumer
from tars_mqtt._core.inbound import Inbound
from tars_mqtt._core.lane import Delivery, Fifo
from tars_mqtt._core.registry import FilterEntry, Registration, Registry
from tars_mqtt._core.stats import Counters
from tests.support import packet as mqtt
from tests.support.packet import Property


class FakeDispatcher:
    """Remembers what it was given, in order."""

    def __init__(self) -> None:
        self.bursts: list[Mapping[Consumer, list[Delivery]]] = []

    def submit(self, batches: Mapping[Consumer, list[Delivery]]) -> None:
        self.bursts.append(batches)


class Harness:
    """An `Inbound` that is connected, with subscriptions known by names."""

    def __init__(self, v5: bool = True, max_payload_bytes: int = 1 << 26) -> None:
        self.v5 = v5
        self.registry = Registry()
        self.dispatcher = FakeDispatcher()
        self.counters = Counters()
        self.elsewhere: list[bytes] = []
        self.taken_elsewhere = False
        self.names: dict[Consumer, str] = {}
        self.inbound = Inbound(
            self.registry,
            self.dispatcher,  # type: ignore[arg-type]
            self.counters,
            self.offer,
            max_payload_bytes=max_payload_bytes,
        )
        self.inbound.new_connection(v5, resumed=False, unknown_session=False, now=0.0)

    def offer(self, first: int, body: bytes) -> bool:
        self.elsewhere.append(body)
        return self.taken_elsewhere

    def subscribe(self, topic: str, name: str | None = None, key_of=None) -> Registration:
        registration = Registration(topic, 0, Consumer(Fifo(), 1, None), key_of)
        self.names[registration.consumer] = name or topic
        self.registry.add(registration)
        return registration

    def entry(self, topic: str) -> FilterEntry:
        entry = self.registry.router.get(topic)
        assert entry is not None
        return entry

    def identifiers(self, *topics: str) -> dict[int, object]:
        return {Property.SUBSCRIPTION_IDENTIFIER: [self.entry(topic).identifier for topic in topics]}

    def enter(self, topic: str = "a/b", payload: bytes = b"x", **options) -> None:
        packet = mqtt.read_packet(Reader(mqtt.publish(topic, payload, level=5 if self.v5 else 4, **options)))
        self.inbound.on_publish(packet.type << 4 | packet.flags, packet.body)

    def receive(self, *args, **options) -> list[str]:
        """Enter one message and hand it over; returns the names of those who got it."""
        self.enter(*args, **options)
        return [name for name, _ in self.delivered()]

    def delivered(self) -> list[tuple[str, bytes]]:
        return [(self.names[consumer], each.message.payload) for consumer, each in self.deliveries()]

    def deliveries(self) -> list[tuple[Consumer, Delivery]]:
        self.dispatcher.bursts.clear()
        self.inbound.hand_over()
        return [
            (consumer, each)
            for burst in self.dispatcher.bursts
            for consumer, batch in burst.items()
            for each in batch
        ]


class Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def __call__(self, count: int) -> bytes:
        taken, self.data = self.data[:count], self.data[count:]
        return taken


def identifier(value: int) -> dict[int, object]:
    return {Property.SUBSCRIPTION_IDENTIFIER: value}


# -- limits -------------------------------------------------------------------------------


def test_a_payload_above_the_limit_is_dropped_and_one_at_the_limit_is_not() -> None:
    harness = Harness(max_payload_bytes=100)
    harness.subscribe("#")
    assert harness.receive("a", b"x" * 100) == ["#"]
    assert harness.receive("a", b"x" * 101) == []
    assert harness.counters.dropped() == {"max_payload_bytes": 1}
    assert harness.elsewhere == []


def test_the_topic_does_not_count_as_payload() -> None:
    harness = Harness(max_payload_bytes=100)
    harness.subscribe("#")
    assert harness.receive("a" * 200, b"x" * 100) == ["#"]


def test_properties_without_end_are_dropped_unread(monkeypatch) -> None:
    """To take them apart would keep the network thread."""
    monkeypatch.setattr(property_module, "decode_properties", lambda _: pytest.fail("was read"))
    harness = Harness()
    harness.subscribe("#")
    assert harness.receive("a", properties={Property.USER_PROPERTY: [("a", "b")] * 20_000}) == []
    assert harness.counters.dropped() == {"max_payload_bytes": 1}


def test_what_is_too_large_is_acknowledged_in_its_turn(caplog) -> None:
    """It would come again for ever; and those before it are not overtaken."""
    harness = Harness(max_payload_bytes=100)
    harness.subscribe("#")
    harness.enter("a", b"small", qos=1, packet_id=1)
    harness.enter("a", b"x" * 101, qos=1, packet_id=2)
    harness.inbound.on_passed_over(0x04, b"\0\x01b" + bytes((0, 3)))
    assert harness.inbound.acknowledgements() == []
    ((_, delivery),) = harness.deliveries()
    delivery.finish()
    assert harness.inbound.acknowledgements() == [
        wire.encode_ack(wire.PUBACK, 1),
        wire.encode_ack(wire.PUBACK, 2),
        wire.encode_ack(wire.PUBREC, 3),
    ]
    assert harness.inbound.on_pubrel(3) == wire.encode_ack(wire.PUBCOMP, 3)
    assert harness.counters.dropped() == {"max_payload_bytes": 2}
    assert harness.inbound.messages == 3
    assert [record.getMessage() for record in caplog.records] == [
        "dropped 1 messages larger than max_payload_bytes, the last of them on 'a'"
    ]


def test_what_is_too_large_and_comes_again_is_counted_once() -> None:
    harness = Harness(max_payload_bytes=100)
    for dup in (False, True):
        harness.inbound.on_passed_over(0x02 | dup << 3, b"\0\x01b" + bytes((0, 3)))
    assert harness.counters.dropped() == {"max_payload_bytes": 1}


# -- routing ------------------------------------------------------------------------------


def test_a_message_goes_to_who_asked_for_it_and_to_nobody_else() -> None:
    harness = Harness()
    harness.subscribe("a/+")
    harness.subscribe("b")
    assert harness.receive("a/b", b"hello", retain=False) == ["a/+"]
    assert harness.receive("c") == []
    assert harness.inbound.messages == 2
    assert harness.counters.dropped() == {"no_handler": 1}


def test_a_burst_is_handed_over_in_one_go_in_order() -> None:
    harness = Harness()
    harness.subscribe("a")
    harness.subscribe("b")
    for number, topic in enumerate("abba"):
        harness.enter(topic, b"%d" % number)
    assert harness.delivered() == [("a", b"0"), ("a", b"3"), ("b", b"1"), ("b", b"2")]
    assert len(harness.dispatcher.bursts) == 1
    assert harness.delivered() == []
    assert harness.dispatcher.bursts == [], "nothing to hand over, nobody to wake"


def test_what_a_handler_is_given_is_what_came() -> None:
    harness = Harness()
    harness.subscribe("#")
    harness.enter("a/b", b"hello", qos=1, packet_id=9, dup=True, properties={Property.CONTENT_TYPE: "text"})
    ((_, delivery),) = harness.deliveries()
    message = delivery.message
    assert (message.topic, message.payload, message.qos, message.retain, message.dup) == (
        "a/b",
        b"hello",
        1,
        False,
        True,
    )
    assert message.properties["content_type"] == "text"


def test_in_mqtt_3_all_filters_that_match_share_the_one_copy() -> None:
    harness = Harness(v5=False)
    for topic in ("a/b", "a/+", "#", "+/c"):
        harness.subscribe(topic)
    assert harness.receive("a/b") == ["a/b", "a/+", "#"]


def test_in_mqtt_5_each_copy_goes_to_the_filter_that_it_was_sent_for() -> None:
    """A broker may send a copy per filter, or one that names them all."""
    harness = Harness()
    for topic in ("a/b", "a/+", "#"):
        harness.subscribe(topic)
    for topic in ("a/b", "a/+", "#"):
        assert harness.receive("a/b", properties=harness.identifiers(topic)) == [topic]
    assert harness.receive("a/b", properties=harness.identifiers("#", "a/b")) == ["a/b", "#"]
    assert harness.receive("a/b", properties=harness.identifiers("a/b", "a/+", "#")) == ["a/b", "a/+", "#"]


def test_a_broker_without_subscription_identifiers_is_matched_by_topic() -> None:
    harness = Harness()
    harness.subscribe("a/b")
    harness.subscribe("#")
    assert harness.receive("a/b") == ["a/b", "#"]


def test_registrations_of_the_same_filter_all_get_each_message_once() -> None:
    for v5 in (True, False):
        harness = Harness(v5)
        harness.subscribe("a/+", "first")
        harness.subscribe("a/+", "second")
        properties = harness.identifiers("a/+") if v5 else None
        assert harness.receive("a/b", properties=properties) == ["first", "second"]


def test_a_shared_filter_and_its_plain_one_are_two() -> None:
    harness = Harness()
    harness.subscribe("$share/g/a", "shared")
    harness.subscribe("a", "plain")
    assert harness.receive("a", properties=harness.identifiers("$share/g/a")) == ["shared"]
    assert harness.receive("a", properties=harness.identifiers("a")) == ["plain"]


def test_routes_follow_the_subscriptions() -> None:
    harness = Harness()
    first = harness.subscribe("a", "first")
    assert harness.receive("a") == ["first"]
    second = harness.subscribe("+", "second")
    assert harness.receive("a") == ["first", "second"]
    third = harness.subscribe("a", "third")
    assert harness.receive("a") == ["first", "third", "second"]
    harness.registry.remove(first)
    assert harness.receive("a") == ["third", "second"]
    harness.registry.remove(second)
    harness.registry.remove(third)
    assert harness.receive("a") == []


@pytest.mark.parametrize("topic", ["a", "nobody's"])
def test_a_route_is_found_once_also_if_it_leads_nowhere(monkeypatch: pytest.MonkeyPatch, topic: str) -> None:
    harness = Harness()
    harness.subscribe("a")
    found: list[str] = []
    route = harness.inbound._route

    def count(topic: str, properties: bytes, retain: bool) -> Any:
        found.append(topic)
        return route(topic, properties, retain)

    monkeypatch.setattr(harness.inbound, "_route", count)
    for _ in range(3):
        harness.receive(topic)
    assert found == [topic]


def test_ever_new_topics_do_not_fill_the_memory(monkeypatch) -> None:
    monkeypatch.setattr(inbound_module, "_MOST_ROUTES", 10)
    harness = Harness()
    harness.subscribe("#")
    for number in range(35):
        assert harness.receive(f"t/{number}") == ["#"]
    assert len(harness.inbound._routes) <= 10
    assert harness.receive("x" * 2000) == ["#"]
    assert not any(len(topic) > 1000 for topic, _ in harness.inbound._routes)


def test_what_nobody_here_wants_is_offered_to_direct_users_of_paho() -> None:
    harness = Harness()
    harness.subscribe("a")
    harness.taken_elsewhere = True
    harness.receive("a")
    assert harness.elsewhere == []
    harness.receive("b", qos=1, packet_id=5)
    assert len(harness.elsewhere) == 1
    assert harness.counters.dropped() == {}
    assert harness.inbound.unacknowledged == 0, "paho acknowledges what it takes"


def test_a_malformed_packet_is_entered_nowhere() -> None:
    harness = Harness()
    harness.subscribe("#")
    with pytest.raises(wire.MalformedPacketError):
        harness.inbound.on_publish(0x30, b"\x00\x05a")
    with pytest.raises(wire.MalformedPacketError):
        harness.inbound.on_publish(0x30, b"\x00\x01a\x02\xff\xff")
    assert harness.delivered() == []


# -- the session of an earlier process ----------------------------------------------------

STALE = identifier(77)


def test_a_copy_for_a_filter_of_an_earlier_process_goes_to_those_who_match() -> None:
    """It was queued while nobody was there: without this it would reach nobody."""
    harness = Harness()
    harness.subscribe("a/b")
    harness.subscribe("#")
    assert harness.receive("a/b", properties=STALE) == ["a/b", "#"]


def test_a_stale_copy_beside_one_of_our_own_is_not_handled_again() -> None:
    """The earlier process's filter is still there: each message comes twice, once for each filter."""
    harness = Harness()
    harness.subscribe("a/b")
    assert harness.receive("a/b", b"queued", properties=STALE) == ["a/b"]
    assert harness.receive("a/b", b"live", properties=harness.identifiers("a/b")) == ["a/b"]
    for number in range(3):
        assert harness.receive("a/b", b"%d" % number, properties=STALE) == []
        assert harness.receive("a/b", b"%d" % number, properties=harness.identifiers("a/b")) == ["a/b"]


def test_each_filter_takes_stale_copies_until_it_has_had_one_of_its_own() -> None:
    harness = Harness()
    harness.subscribe("a/b")
    harness.subscribe("#")
    harness.receive("a/b", properties=harness.identifiers("#"))
    assert harness.receive("a/b", properties=STALE) == ["a/b"]


def test_a_new_session_has_no_stale_copies_and_an_old_one_still_may() -> None:
    harness = Harness()
    harness.subscribe("a/b")
    harness.receive("a/b", properties=harness.identifiers("a/b"))
    harness.inbound.new_connection(True, resumed=True, unknown_session=False, now=0.0)
    assert harness.receive("a/b", properties=STALE) == []
    harness.inbound.new_connection(True, resumed=False, unknown_session=True, now=0.0)
    assert harness.receive("a/b", properties=STALE) == ["a/b"]


# -- retained messages --------------------------------------------------------------------


def test_retained_messages_go_to_whom_they_were_asked_for() -> None:
    """Whoever was there before has had them."""
    harness = Harness()
    harness.subscribe("a/+", "old")
    new = harness.subscribe("a/+", "new")
    harness.entry("a/+").replay = (new,)
    own = harness.identifiers("a/+")
    assert harness.receive("a/b", retain=True, properties=own) == ["new"]
    assert harness.receive("a/b", retain=False, properties=own) == ["old", "new"]
    assert harness.receive("a/b", retain=True, properties=own) == ["new"]


def test_retained_messages_for_one_filter_do_not_go_to_another() -> None:
    harness = Harness()
    old, new = harness.subscribe("#", "old"), harness.subscribe("a/+", "new")
    harness.entry("#").replay = (old,)
    harness.entry("a/+").replay = (new,)
    assert harness.receive("a/b", retain=True, properties=harness.identifiers("a/+")) == ["new"]


# -- acknowledgements ---------------------------------------------------------------------


def acknowledged(harness: Harness) -> list[bytes]:
    return harness.inbound.acknowledgements()


def test_a_message_is_acknowledged_when_all_its_handlers_are_done() -> None:
    harness = Harness(v5=False)
    harness.subscribe("a")
    harness.subscribe("#")
    harness.enter("a", qos=1, packet_id=3)
    (_, first), (_, second) = harness.deliveries()
    first.finish()
    assert acknowledged(harness) == []
    second.finish()
    assert acknowledged(harness) == [mqtt.puback(3)]


def test_each_copy_is_acknowledged_by_itself() -> None:
    harness = Harness()
    harness.subscribe("a")
    harness.subscribe("#")
    harness.enter("a", qos=1, packet_id=3, properties=harness.identifiers("a"))
    harness.enter("a", qos=1, packet_id=4, properties=harness.identifiers("#"))
    (_, first), (_, second) = harness.deliveries()
    second.finish()
    assert acknowledged(harness) == []
    first.finish()
    assert acknowledged(harness) == [mqtt.puback(3), mqtt.puback(4)]


def test_what_nobody_handles_is_acknowledged_in_its_turn() -> None:
    harness = Harness()
    harness.subscribe("a")
    harness.enter("a", qos=1, packet_id=3)
    harness.enter("nobody", qos=1, packet_id=4)
    assert acknowledged(harness) == []
    ((_, delivery),) = harness.deliveries()
    delivery.finish()
    assert acknowledged(harness) == [mqtt.puback(3), mqtt.puback(4)]
    assert harness.inbound.unacknowledged == 0


def test_a_redelivery_of_what_is_in_work_is_not_handled_twice() -> None:
    harness = Harness()
    harness.subscribe("a")
    harness.enter("a", qos=1, packet_id=3)
    ((_, delivery),) = harness.deliveries()
    harness.inbound.new_connection(True, resumed=True, unknown_session=False, now=0.0)
    assert harness.receive("a", qos=1, packet_id=3, dup=True) == []
    assert acknowledged(harness) == []
    delivery.finish()
    assert acknowledged(harness) == [mqtt.puback(3)]


def test_qos_2_is_received_handled_once_and_completed() -> None:
    harness = Harness()
    harness.subscribe("a")
    harness.enter("a", qos=2, packet_id=3)
    ((_, delivery),) = harness.deliveries()
    delivery.finish()
    assert acknowledged(harness) == [mqtt.pubrec(3)]
    assert harness.receive("a", qos=2, packet_id=3, dup=True) == []
    assert acknowledged(harness) == [mqtt.pubrec(3)]
    assert harness.inbound.on_pubrel(3) == mqtt.pubcomp(3)
    assert harness.inbound.on_pubrel(3) is None, "for whoever else may know it"


def test_what_was_entered_before_a_malformed_packet_is_handled_all_the_same() -> None:
    """The connection ends there; what came before would be taken for being in work when it comes again."""
    harness = Harness()
    harness.subscribe("a")
    harness.enter("a", qos=1, packet_id=3)
    harness.dispatcher.bursts.clear()
    harness.inbound.new_connection(True, resumed=True, unknown_session=False, now=0.0)
    ((batch,),) = [list(burst.values()) for burst in harness.dispatcher.bursts]
    assert harness.receive("a", qos=1, packet_id=3, dup=True) == []
    batch[0].finish()
    assert acknowledged(harness) == [mqtt.puback(3)]


# -- before anybody has subscribed --------------------------------------------------------


def unknown_session() -> Harness:
    harness = Harness()
    harness.inbound.new_connection(True, resumed=False, unknown_session=True, now=0.0)
    return harness


def test_messages_of_an_earlier_process_wait_for_this_one_to_subscribe() -> None:
    """It subscribes after connect(); acknowledged at once, they would be lost."""
    harness = unknown_session()
    for number in range(3):
        assert harness.receive("a/b", b"%d" % number, qos=1, packet_id=number + 1, properties=STALE) == []
    assert acknowledged(harness) == []
    harness.subscribe("other")
    harness.inbound.route_early()
    assert harness.deliveries() == []
    harness.subscribe("a/#", "first")
    harness.subscribe("a/b", "second")
    harness.inbound.route_early()
    deliveries = harness.deliveries()
    assert [(harness.names[consumer], each.message.payload) for consumer, each in deliveries] == [
        ("first", b"0"),
        ("first", b"1"),
        ("first", b"2"),
        ("second", b"0"),
        ("second", b"1"),
        ("second", b"2"),
    ]
    for _, each in deliveries[:5]:
        each.finish()
    assert acknowledged(harness) == [mqtt.puback(1), mqtt.puback(2)]
    deliveries[5][1].finish()
    assert acknowledged(harness) == [mqtt.puback(3)]


def test_what_waited_comes_before_what_follows() -> None:
    harness = unknown_session()
    harness.enter("a", b"waited", qos=1, packet_id=1)
    harness.subscribe("a")
    harness.enter("a", b"followed", qos=1, packet_id=2)
    assert harness.delivered() == [("a", b"waited"), ("a", b"followed")]


def test_what_nobody_comes_for_is_acknowledged_in_the_end(caplog: pytest.LogCaptureFixture) -> None:
    harness = unknown_session()
    harness.enter("a", qos=1, packet_id=1)
    harness.enter("b", qos=2, packet_id=2)
    assert acknowledged(harness) == []
    assert harness.inbound.tick(10.0) == 10.0
    assert acknowledged(harness) == [mqtt.puback(1), mqtt.pubrec(2)]
    assert harness.counters.dropped() == {"no_handler": 2}
    (warning,) = caplog.records
    assert "subscribe before connect()" in warning.getMessage()
    harness.enter("a", qos=1, packet_id=3)
    assert acknowledged(harness) == [mqtt.puback(3)], "from now on nobody is waited for"


def test_qos_0_waits_for_nobody() -> None:
    harness = unknown_session()
    harness.enter("a")
    assert harness.counters.dropped() == {"no_handler": 1}
    harness.subscribe("a")
    harness.inbound.route_early()
    assert harness.delivered() == []


def test_a_session_of_our_own_has_nothing_that_waits() -> None:
    harness = Harness()
    harness.inbound.new_connection(True, resumed=True, unknown_session=False, now=0.0)
    harness.enter("a", qos=1, packet_id=1)
    assert acknowledged(harness) == [mqtt.puback(1)]


def test_what_waits_goes_on_waiting_over_a_reconnect() -> None:
    harness = unknown_session()
    harness.enter("a", qos=1, packet_id=1)
    harness.inbound.new_connection(True, resumed=True, unknown_session=False, now=0.0)
    assert harness.inbound.tick(1.0) == inbound_module._EARLY_TIME
    assert harness.receive("a", qos=1, packet_id=1, dup=True) == []
    harness.subscribe("a")
    harness.inbound.route_early()
    ((_, delivery),) = harness.deliveries()
    assert acknowledged(harness) == []
    delivery.finish()
    assert acknowledged(harness) == [mqtt.puback(1)]


def test_a_reconnect_does_not_cut_the_time_short_in_which_somebody_may_subscribe() -> None:
    """Nothing had come yet: it comes on the next connection of the same session."""
    harness = unknown_session()
    harness.inbound.new_connection(True, resumed=True, unknown_session=False, now=1.0)
    harness.enter("a", qos=1, packet_id=1)
    assert acknowledged(harness) == []
    assert harness.inbound.tick(2.0) == 1.0 + inbound_module._EARLY_TIME


def test_what_waits_is_forgotten_with_its_session() -> None:
    harness = unknown_session()
    harness.enter("a", qos=1, packet_id=1)
    harness.inbound.new_connection(True, resumed=False, unknown_session=False, now=0.0)
    harness.subscribe("a")
    harness.inbound.route_early()
    assert harness.delivered() == []


# -- shutting down ------------------------------------------------------------------------


def test_a_client_that_shuts_down_takes_no_more_and_acknowledges_nothing_it_did_not_take() -> None:
    harness = Harness()
    harness.subscribe("a")
    harness.enter("a", qos=1, packet_id=1)
    ((_, delivery),) = harness.deliveries()
    harness.inbound.close()
    assert harness.receive("a", qos=1, packet_id=2) == []
    delivery.finish()
    assert acknowledged(harness) == [mqtt.puback(1)]


def test_what_a_shutdown_left_unhandled_is_handled_when_it_comes_again() -> None:
    harness = Harness()
    harness.subscribe("a")
    assert harness.receive("a", qos=1, packet_id=1) == ["a"]
    harness.inbound.close()
    harness.inbound.open()
    harness.inbound.new_connection(True, resumed=True, unknown_session=False, now=0.0)
    assert harness.receive("a", qos=1, packet_id=1, dup=True) == ["a"]


def test_what_is_in_work_over_a_disconnect_is_not_handled_twice() -> None:
    """The handlers go on meanwhile."""
    harness = Harness()
    harness.subscribe("a")
    harness.enter("a", qos=1, packet_id=1)
    ((_, delivery),) = harness.deliveries()
    harness.inbound.open()
    harness.inbound.new_connection(True, resumed=True, unknown_session=False, now=0.0)
    assert harness.receive("a", qos=1, packet_id=1, dup=True) == []
    delivery.finish()
    assert acknowledged(harness) == [mqtt.puback(1)]


# -- keys ---------------------------------------------------------------------------------


def test_the_key_of_order_by_is_asked_of_the_message() -> None:
    harness = Harness()
    harness.subscribe("#", key_of=lambda message: message.topic.split("/")[1])
    harness.enter("a/b")
    ((_, delivery),) = harness.deliveries()
    assert delivery.key == "b"


@pytest.mark.parametrize("key_of", [lambda message: 1 / 0, lambda message: ["unhashable"]])
def test_a_message_whose_key_fails_is_handled_without_one(key_of, caplog) -> None:
    """A mistake in a user's function costs neither the message nor the connection."""
    harness = Harness()
    harness.subscribe("#", key_of=key_of)
    harness.enter("a/b")
    ((_, delivery),) = harness.deliveries()
    assert delivery.key is None
    assert "order_by failed on a message of 'a/b'" in caplog.text
