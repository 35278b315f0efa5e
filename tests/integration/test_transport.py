"""Every way in: TLS, client certificates, websockets, Unix sockets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from tars_mqtt import MQTTClient, aio
from tests.support import ScriptedBroker
from tests.support.certificate import Authority
from tests.support.port import HOST, free_port
from tests.support.wait import connect_error, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support import Broker, ScriptedConnection

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


def works(make_client: Any, doors: Doors, url: str, **settings: Any) -> None:
    """A large message goes out and comes back as it was, and a small one behind it."""
    received: list[bytes] = []
    large = os.urandom(1_000_000)
    client = make_client(url, **QUICK, **settings)
    client.subscribe("+", received.append, 1)
    client.connect()
    with kept_awake(doors.broker):
        client.publish("large", large, qos=1)
        client.publish("echo", b"here", qos=1)
        eventually(lambda: len(received) == 2)
    assert received == [large, b"here"]


@contextlib.contextmanager
def kept_awake(broker: Broker) -> Iterator[None]:
    """Have mosquitto look up often: it writes 4 KiB of a websocket's message, and then sleeps for 0.1 s."""
    enough = threading.Event()

    def talk() -> None:
        with MQTTClient(broker.url, "talk") as client:
            while not enough.wait(0.002):
                client.publish("so/to/say", b"")

    talking = threading.Thread(target=talk)
    talking.start()
    try:
        yield
    finally:
        enough.set()
        talking.join(10)


def test_tls(make_client, doors: Doors, authority: Authority) -> None:
    works(make_client, doors, f"mqtts://localhost:{doors.tls}", tls_ca=authority.ca)


def test_tls_with_a_client_certificate(make_client, doors: Doors, authority: Authority) -> None:
    client = authority.issue("client", "service@example.org")
    works(make_client, doors, f"mqtts://localhost:{doors.tls_client}", tls_ca=authority.ca, **client)


def test_websockets(make_client, doors: Doors) -> None:
    works(make_client, doors, f"ws://localhost:{doors.websocket}/mqtt")


def test_websockets_over_tls(make_client, doors: Doors, authority: Authority) -> None:
    works(make_client, doors, f"wss://localhost:{doors.tls_websocket}/mqtt", tls_ca=authority.ca)


def test_a_unix_socket(make_client, doors: Doors) -> None:
    works(make_client, doors, f"mqtt+unix://{doors.socket}")


# -- headers of websockets ----------------------------------------------------------------------------


def shakes_hands(headers: list[dict[str, str]]) -> Callable[[ScriptedConnection], None]:
    """A script that reads a websocket's request, and refuses it."""

    def play(connection: ScriptedConnection) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += connection._receive(1)
        headers.append(dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:] if line))
        connection.send(b"HTTP/1.1 403 Forbidden\r\n\r\n")

    return play


def shown(make_client: Any, headers: Any, count: int = 1) -> list[dict[str, str]]:
    """The headers of the first handshakes."""
    seen: list[dict[str, str]] = []
    with ScriptedBroker(shakes_hands(seen)) as broker:
        client = make_client(broker.url.replace("mqtt", "ws"), ws_headers=headers, **QUICK)
        connect_error(client, "the peer answers 'HTTP/1.1 403 Forbidden'", enough=lambda: len(seen) >= count)
    return seen[:count]


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer hunter2", "host": "elsewhere"},
        "Authorization: Bearer hunter2, host: elsewhere",
        "\nAuthorization: Bearer hunter2\nhost: elsewhere\n",
        lambda: {"Authorization": "Bearer hunter2", "host": "elsewhere"},
    ],
    ids=["dict", "commas", "lines", "function"],
)
def test_headers_are_shown_in_the_handshake_and_nowhere_else(make_client, headers, caplog) -> None:
    """Host and Origin may be replaced; what belongs to the handshake stays."""
    caplog.set_level("DEBUG", "tars_mqtt")
    (seen,) = shown(make_client, headers)
    assert seen["Authorization"] == "Bearer hunter2"
    assert seen["host"] == "elsewhere"
    assert "Host" not in seen
    assert seen["Sec-WebSocket-Protocol"] == "mqtt"
    assert "hunter2" not in caplog.text


def test_headers_may_be_others_at_each_attempt(make_client) -> None:
    left = list("abcdefghijklmnopqrstuvwxyz")
    seen = shown(make_client, lambda: {"X-Token": left.pop(0)}, count=2)
    assert [headers["X-Token"] for headers in seen] == ["a", "b"]


@pytest.mark.parametrize(
    ("outcome", "problem"),
    [
        (None, "returned is a NoneType, and not a dict"),
        ({"X-Token": "hunter2\r\nX-More: 1"}, "returned must have text without line breaks for 'X-Token'"),
        (OSError("hunter2"), "the ws_headers callable failed: OSError"),
    ],
)
def test_headers_that_cannot_be_had_are_an_error_that_quotes_nothing(outcome, problem, caplog) -> None:
    def ask() -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    client = MQTTClient(f"ws://localhost:{free_port()}", "c", ws_headers=ask, **QUICK)
    assert "hunter2" not in connect_error(client, problem) + caplog.text


async def test_a_coroutine_function_gives_headers_on_the_loop(doors: Doors) -> None:
    asked: list[object] = []

    async def ask() -> dict[str, str]:
        asked.append(asyncio.get_running_loop())
        return {"X-Token": "a"}

    async with aio.MQTTClient(f"ws://localhost:{doors.websocket}", "c", ws_headers=ask, **QUICK):
        assert asked == [asyncio.get_running_loop()]
