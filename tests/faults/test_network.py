"""A network that cuts, swallows, slows and spoils: nothing accepted is lost, and both ends come back."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from tars_mqtt import PublishError
from tests.support import Broker, FaultProxy, Traffic, eventually
from tests.support.thread import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable


def refuse_for_a_while(network: FaultProxy) -> None:
    network.refuse()
    network.cut()
    threading.Timer(0.3, network.accept).start()


# -- ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [FaultProxy.cut, FaultProxy.hang_up, FaultProxy.half_close, refuse_for_a_while],
    ids=["RST", "FIN", "half-close", "refused"],
)
def test_connections_that_break_lose_nothing(
    make_client, network: FaultProxy, fault: Callable[[FaultProxy], None]
) -> None:
    """Three times, with events on their way before and after the break."""
    traffic = Traffic(make_client, network.url)
    for _ in range(3):
        traffic.publish(50)
        traffic.disturbed_by(lambda: fault(network))
        traffic.publish(50)
    traffic.assert_nothing_is_lost()
    traffic.assert_order()


def test_a_half_close_towards_the_broker_loses_nothing(make_client, network: FaultProxy) -> None:
    """The broker reads our end, and leaves; what we had written last it may not have read."""
    traffic = Traffic(make_client, network.url)
    traffic.publish(50)
    traffic.disturbed_by(lambda: network.half_close("to_broker"))
    traffic.publish(50)
    traffic.assert_nothing_is_lost()


@pytest.mark.parametrize("direction", ["to_broker", "to_client"])
def test_connections_cut_inside_a_packet_lose_nothing(make_client, network: FaultProxy, direction) -> None:
    """At every byte of a short exchange: inside CONNECT or CONNACK, inside a PUBLISH or its PUBACK."""
    traffic = Traffic(make_client, network.url)
    for offset in range(3, 160, 17):
        network.cut_after(offset, direction)
        network.cut()
        traffic.publish(3)
    traffic.assert_nothing_is_lost()


# -- silence ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["to_broker", "to_client", None])
def test_a_blackholed_link_is_noticed_and_loses_nothing(make_client, network: FaultProxy, direction) -> None:
    traffic = Traffic(make_client, network.url, keepalive=1)
    traffic.publish(20)
    traffic.assert_nothing_is_lost()

    def blackhole() -> None:
        network.stall(direction)
        traffic.publish(20)
        eventually(lambda: not traffic.publisher.connected and not traffic.listener.connected)
        network.resume(direction)

    traffic.disturbed_by(blackhole)
    traffic.assert_nothing_is_lost()


# -- slowness -----------------------------------------------------------------------------------------


def test_a_link_that_hands_out_single_bytes_changes_nothing(make_client, network: FaultProxy) -> None:
    network.slice(1)
    traffic = Traffic(make_client, network.url)
    traffic.publish(20)
    traffic.assert_nothing_is_lost()
    traffic.assert_order()
    assert traffic.publisher.stats().connections == 1


def test_latency_is_borne_by_the_window(make_client, network: FaultProxy) -> None:
    """100 ms each way: 200 messages take a few round trips, not 200."""
    network.latency(0.1)
    traffic = Traffic(make_client, network.url)
    traffic.publish(200)
    traffic.assert_nothing_is_lost()
    traffic.assert_order()
    assert traffic.publisher.stats().connections == 1


def test_a_narrow_link_is_waited_for(make_client, network: FaultProxy) -> None:
    """64 kB/s: a message of 100 kB takes a while, and no impatience cuts it off."""
    traffic = Traffic(make_client, network.url, keepalive=4)
    network.bandwidth(64_000)
    receipt = traffic.publisher.submit_event("large", "n", "x" * 100_000, qos=1)
    traffic.publish(10)
    assert receipt.result(20) == receipt.envelope_id
    traffic.assert_nothing_is_lost()
    assert traffic.publisher.stats().connections == 1


def test_who_leaves_over_a_narrow_link_waits_for_a_broker_that_still_reads(
    make_client, network: FaultProxy, broker: Broker
) -> None:
    """Closed in the middle, with something still coming, the connection would be reset, and the rest lost."""
    talker = make_client(broker.url)
    talker.connect()
    received: list[bytes] = []
    talker.subscribe("burst", received.append)
    client = make_client(network.url, "leaving")
    client.subscribe("chat", lambda _: None)
    client.connect()
    network.bandwidth(1_500_000)
    for _ in range(1500):
        client.publish("burst", b"x" * 3000)
    leaving = in_thread(client.shutdown, 20)

    def all_came() -> bool:
        talker.publish("chat", b"x")
        return leaving.done() and len(received) == 1500

    eventually(all_came)
    leaving.result(0)
    eventually(lambda: "Received DISCONNECT from leaving" in broker.log)


# -- spoilt bytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["to_broker", "to_client"])
def test_a_flipped_bit_that_can_be_seen_loses_nothing(make_client, network: FaultProxy, direction) -> None:
    """In the type of a packet under way: whoever reads it hangs up, and all is sent again."""
    traffic = Traffic(make_client, network.url)
    traffic.publish(5)
    traffic.assert_nothing_is_lost()
    network.flip_next_bit(direction, bit=7)
    traffic.publish(20)
    traffic.assert_nothing_is_lost()
    assert network.flips_to_come == 0


@pytest.mark.parametrize("direction", ["to_broker", "to_client"])
def test_flipped_bits_of_any_kind_are_survived(make_client, network: FaultProxy, direction, caplog) -> None:
    """MQTT has no checksum: a spoilt payload or packet id is believed. But no thread dies, and all goes on."""
    traffic = Traffic(make_client, network.url)
    for after, bit in [*((0, bit) for bit in range(8)), (1, 0), (1, 7), (2, 3), (5, 6)]:
        network.flip_next_bit(direction, bit, after)
        traffic.publish(2)
        eventually(lambda: network.flips_to_come == 0)
        network.cut()
    for receipt in traffic.receipts:
        assert isinstance(receipt.exception(20), PublishError | None)
    traffic.disturbed_by(network.cut)
    traffic.assert_nothing_is_lost(since=traffic.publish(20))
    assert "internal error" not in caplog.text
