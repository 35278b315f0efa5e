"""Every way in: TLS, client certificates, websockets, Unix sockets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import pytest

from tests.support.certificate import Authority
from tests.support.port import HOST, free_port
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support import Broker

QUICK = {"reconnect_min_delay": 0.1, "reconnect_max_delay": 0.5, "session_expiry": 0}


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@attrs.frozen
class Doors:
    """One mosquitto with many listeners."""

    broker: Broker
    tls: int
    tls_client: int
    websocket: int
    tls_websocket: int
    socket: str


@pytest.fixture
def doors(make_broker: Callable[..., Broker], authority: Authority, tmp_path: Path) -> Doors:
    ports = [free_port() for _ in range(4)]
    socket = str(tmp_path / "mosquitto.sock")
    return Doors(
        make_broker(
            [
                *authority.listener(ports[0], HOST),
                *authority.listener(ports[1], HOST),
                "require_certificate true",
                f"listener {ports[2]} {HOST}",
                "protocol websockets",
                *authority.listener(ports[3], HOST),
                "protocol websockets",
                f"listener 0 {socket}",
            ]
        ),
        *ports,
        socket,
    )


def works(make_client: Any, url: str, **settings: Any) -> None:
    """A large message goes out and a small one comes back."""
    received: list[bytes] = []
    client = make_client(url, **QUICK, **settings)
    client.subscribe("echo", received.append, 1)
    client.connect()
    client.publish("large", b"x" * 1_000_000, qos=1)
    client.publish("echo", b"here", qos=1)
    eventually(lambda: received == [b"here"])


def test_tls(make_client, doors: Doors, authority: Authority) -> None:
    works(make_client, f"mqtts://localhost:{doors.tls}", tls_ca=authority.ca)


def test_tls_with_a_client_certificate(make_client, doors: Doors, authority: Authority) -> None:
    client = authority.issue("client", "service@example.org")
    works(make_client, f"mqtts://localhost:{doors.tls_client}", tls_ca=authority.ca, **client)


def test_websockets(make_client, doors: Doors) -> None:
    works(make_client, f"ws://localhost:{doors.websocket}/mqtt")


def test_websockets_over_tls(make_client, doors: Doors, authority: Authority) -> None:
    works(make_client, f"wss://localhost:{doors.tls_websocket}/mqtt", tls_ca=authority.ca)


def test_a_unix_socket(make_client, doors: Doors) -> None:
    works(make_client, f"mqtt+unix://{doors.socket}")
