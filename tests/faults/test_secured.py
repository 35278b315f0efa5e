"""A bad network and a killed broker, under TLS and under websockets: what holds over plain TCP holds there too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import pytest

from tests.support import FaultProxy, Traffic, eventually
from tests.support.certificate import Authority
from tests.support.port import HOST, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support import Broker

# What lies between the two clients and the byte stream is the same: once is enough.
pytestmark = pytest.mark.parametrize("make_client", ["sync"], indirect=True)


@attrs.frozen
class Way:
    """A way to a broker, for `Traffic`, and what it leads through."""

    url: str
    settings: dict[str, Any]
    network: FaultProxy
    broker: Broker

    def traffic(self, make_client: Any, **settings: Any) -> Traffic:
        return Traffic(make_client, self.url, **self.settings, **settings)


@pytest.fixture(params=["mqtts", "wss", "ws"])
def way(request: pytest.FixtureRequest, make_broker: Any, tmp_path: Path) -> Iterator[Way]:
    authority, port, scheme = Authority(tmp_path), free_port(), request.param
    listener = [f"listener {port} {HOST}"] if scheme == "ws" else authority.listener(port, HOST)
    framing = [] if scheme == "mqtts" else ["protocol websockets"]
    broker = make_broker([*listener, *framing], persistence=True)
    settings = {} if scheme == "ws" else {"tls_ca": authority.ca}
    with FaultProxy(f"mqtt://{HOST}:{port}") as network:
        yield Way(f"{scheme}://{HOST}:{network.port}", settings, network, broker)


@pytest.mark.parametrize("fault", [FaultProxy.cut, FaultProxy.hang_up, FaultProxy.half_close])
def test_connections_that_break_lose_nothing(
    make_client: Any, way: Way, fault: Callable[[FaultProxy], None]
) -> None:
    """RST, FIN, and half of a FIN; without the goodbye that TLS and websockets have of their own."""
    traffic = way.traffic(make_client)
    for _ in range(2):
        traffic.publish(50)
        traffic.disturbed_by(lambda: fault(way.network))
        traffic.publish(50)
    traffic.assert_nothing_is_lost()


def test_a_blackholed_link_is_noticed_and_nothing_is_lost(make_client: Any, way: Way) -> None:
    traffic = way.traffic(make_client, keepalive=1)
    traffic.publish(20)
    way.network.stall()
    traffic.publish(20)
    eventually(lambda: not traffic.publisher.connected and not traffic.listener.connected)
    way.network.resume()
    traffic.assert_nothing_is_lost()


def test_a_link_that_hands_out_single_bytes_changes_nothing(make_client: Any, way: Way) -> None:
    """From the first byte of the handshake on."""
    way.network.slice(1)
    traffic = way.traffic(make_client)
    traffic.publish(20)
    traffic.assert_nothing_is_lost()
    traffic.assert_order()
    assert traffic.publisher.stats().connections == 1


def test_kill_9_of_a_broker_that_remembers_loses_nothing(make_client: Any, way: Way) -> None:
    traffic = way.traffic(make_client)
    traffic.publish(30)
    traffic.assert_nothing_is_lost()
    way.broker.kill()
    eventually(lambda: not traffic.publisher.connected)
    traffic.publish(30)
    way.broker.start()
    traffic.assert_nothing_is_lost()


@pytest.mark.parametrize("way", ["mqtts", "wss"], indirect=True)
@pytest.mark.parametrize("direction", ["to_broker", "to_client"])
def test_a_flipped_bit_is_a_bad_record_and_costs_a_connection(
    make_client: Any, way: Way, direction: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever bit it is: over plain TCP, one in a payload would not be noticed."""
    traffic = way.traffic(make_client)
    traffic.publish(5)
    traffic.assert_nothing_is_lost()
    way.network.flip_next_bit(direction, after=20)  # in what is encrypted: 5 bytes are the record's header
    traffic.publish(20)
    traffic.assert_nothing_is_lost()

    def losses() -> list[str]:
        return [record.message for record in caplog.records if record.message.startswith("connection lost")]

    # An acknowledgement that was hit costs the connection when all has arrived already.
    eventually(losses)
    assert len(losses()) == 1
    if direction == "to_client":
        assert "bad record mac" in losses()[0]
