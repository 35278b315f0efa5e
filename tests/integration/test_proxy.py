"""Through a proxy: SOCKS 5 and HTTP, with and without a login, in front of every kind of connection over TCP."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tars_mqtt import ClosedError, MQTTClient
from tests.integration.test_transport import authority, doors, works
from tests.support import eventually
from tests.support.port import HOST, free_port
from tests.support.tunnel import Tunnel
from tests.support.wait import connect_error

if TYPE_CHECKING:
    from tests.integration.test_transport import Authority, Doors

__all__ = ["authority", "doors"]

KINDS = ("socks5", "http")
SECRET = "hunter2"
LOGIN = ("me@work", f"{SECRET}:/%")
LOGIN_IN_URL = f"me%40work:{SECRET}%3A%2F%25@"


def error_of(proxy: str, reason: str, *, wait: float = 0.5, **settings: Any) -> str:
    client = MQTTClient(
        "mqtt://broker.invalid:1883", "through", proxy=proxy, reconnect_min_delay=0.1, **settings
    )
    return connect_error(client, reason, wait=wait)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["mqtt", "mqtts", "ws", "wss"])
def test_every_connection_over_tcp_goes_through_a_proxy(
    make_client, doors: Doors, authority: Authority, kind, scheme
) -> None:
    """The proxy is told the broker's name, and resolves it; a large message comes through whole."""
    port = {
        "mqtt": doors.broker.port,
        "mqtts": doors.tls,
        "ws": doors.websocket,
        "wss": doors.tls_websocket,
    }[scheme]
    settings = {"tls_ca": authority.ca} if scheme in ("mqtts", "wss") else {}
    with Tunnel(kind) as proxy:
        works(make_client, doors, f"{scheme}://localhost:{port}", proxy=proxy.url, **settings)
        assert set(proxy.asked) == {("localhost", port)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_login_is_given_to_the_proxy_and_shown_to_nobody(make_client, shared_broker, kind, caplog) -> None:
    caplog.set_level("DEBUG", "tars_mqtt")
    with Tunnel(kind, LOGIN) as proxy:
        url = f"{kind}://{LOGIN_IN_URL}{HOST}:{proxy.port}"
        client = make_client(f"mqtt://{HOST}:{shared_broker.port}", proxy=url)
        client.connect()
        proxy.cut()
        eventually(lambda: client.stats().reconnects == 1 and client.connected)
        assert SECRET not in caplog.text + repr(client.config) + repr(client)
        assert f"proxy='{kind}://me%40work:***@{HOST}:{proxy.port}'" in repr(client.config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("user", ["", f"me:{SECRET}@"])
def test_a_login_that_is_refused_raises_at_once(kind, user) -> None:
    """Waiting is no use."""
    with Tunnel(kind, LOGIN) as proxy:
        started = time.monotonic()
        error = error_of(
            f"{kind}://{user}{HOST}:{proxy.port}",
            f"cannot reach mqtt://broker.invalid:1883 through the proxy {kind}://",
            wait=30,
        )
        assert time.monotonic() - started < 20
    assert error.endswith("; check user name and password in proxy")
    assert SECRET not in error


@pytest.mark.parametrize(
    ("kind", "answer", "said"),
    [
        ("socks5", b"\5\0\5\5\0\1" + bytes(6), "connection refused"),
        ("socks5", b"\5\0\5\2\0\1" + bytes(6), "its rules do not allow it"),
        ("socks5", b"\5\0\5\x63\0\1" + bytes(6), "unknown reason 99"),
        ("socks5", b"HTTP/1.1 400 Bad Request\r\n\r\n", "the peer does not speak SOCKS 5"),
        ("http", b"HTTP/1.1 403 Go\x1b[31m away\r\n\r\n", r"it answers 'HTTP/1.1 403 Go\x1b[31m away'"),
        ("http", b"\5\xff\r\n\r\n", "the peer does not speak HTTP"),
        ("http", b"HTTP/1.1 " + b"9" * 20_000, "it answers 'HTTP/1.1 99"),
        ("http", b"HTTP/1.1 200 OK\r\n\r\n\x20\2\0\0", "it sent more than its answer"),
    ],
)
def test_what_the_proxy_says_is_named_shortened_and_escaped(kind, answer, said) -> None:
    with Tunnel(kind, answer=answer) as proxy:
        assert len(error_of(proxy.url, said)) < 400


@pytest.mark.parametrize("kind", KINDS)
def test_a_proxy_that_does_not_answer_is_waited_for_until_the_deadline(kind) -> None:
    with Tunnel(kind, answer=b"") as proxy:
        error_of(proxy.url, "no answer in time", connect_timeout=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_proxy_that_is_not_there_is_named(kind) -> None:
    proxy = f"{kind}://{HOST}:{free_port()}"
    error_of(proxy, f"cannot reach {proxy}: connection refused")


@pytest.mark.parametrize("kind", KINDS)
def test_a_proxy_that_hangs_does_not_hold_up_a_shutdown(make_client, kind) -> None:
    def connect() -> None:
        with pytest.raises(ClosedError):
            client.connect()

    with Tunnel(kind, answer=b"") as proxy:
        client = make_client("mqtt://broker.invalid:1883", proxy=proxy.url, connect_timeout=40)
        connecting = threading.Thread(target=connect)
        connecting.start()
        eventually(lambda: len(proxy._sockets) == 1)
        started = time.monotonic()
        client.shutdown(timeout=10)
        assert time.monotonic() - started < 8
        connecting.join(10)
