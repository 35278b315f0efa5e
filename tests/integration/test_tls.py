"""TLS: who is trusted, what is said when somebody is not, and files that change while it runs."""

from __future__ import annotations

import logging
import os
import re
import socket
import ssl
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tars_mqtt import ConnectError, MQTTClient, MQTTClientConfig
from tars_mqtt._core.limit import Limit
from tars_mqtt._core.tls import secure
from tests.support import ScriptedBroker, accept_and_serve
from tests.support.certificate import EXPIRED, NOT_YET_VALID, VALID, Authority, Validity, serial_number
from tests.support.port import HOST, free_port
from tests.support.scripted import RESET
from tests.support.tls_fault import FAULTS, Fault, Link
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

MIN_DELAY, MAX_DELAY = 0.1, 0.5
QUICK = {"reconnect_min_delay": MIN_DELAY, "reconnect_max_delay": MAX_DELAY, "shutdown_timeout": 2.0}

every_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)


@pytest.fixture
def link(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Link]:
    fault = request.node.callspec.params.get("fault") if hasattr(request.node, "callspec") else None
    with Link(tmp_path, **(fault.link if fault else {})) as link:
        yield link


@pytest.fixture(autouse=True)
def secrets_stay_secret(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No password is in what is logged, at any level, or hangs on to a record."""
    caplog.set_level(logging.DEBUG)
    yield
    for record in caplog.get_records("call"):
        assert not secrets_in(f"{record.getMessage()} {vars(record)} {record.exc_info}")
    assert not secrets_in(caplog.text)


def secrets_in(text: str) -> list[str]:
    return re.findall(r"\w+-secret", text)


def chain_of(error: BaseException | None) -> str:
    """All that an error and those behind it have to say, and hold."""
    text = "".join(traceback.format_exception(error)) if error else ""
    while error is not None:
        text += f"{error!r} {error.args!r} {vars(error)!r}"
        error = error.__cause__ or error.__context__
    return text


def client_of(link: Link, **settings: Any) -> MQTTClient:
    return MQTTClient(settings.pop("mqtt_url", link.url), "tls", **QUICK | link.settings | settings)


# -- faults -------------------------------------------------------------------------------


@every_fault
def test_a_fault_is_named_by_the_first_connect_which_leaves_nothing_behind(link: Link, fault: Fault) -> None:
    """At once where trying again cannot cure it, else when its time is up."""
    fault.happen(link)
    client = client_of(link, connect_timeout=30.0 if fault.lasting else 1.0)
    with pytest.raises(fault.error) as caught:
        client.connect()
    assert fault.is_named_in(str(caught.value), link), str(caught.value)
    assert not secrets_in(chain_of(caught.value) + repr(client.config))
    assert not [thread for thread in threading.enumerate() if "tars-mqtt/tls" in thread.name]


@every_fault
def test_a_fault_that_comes_later_is_named_and_no_hot_loop(
    link: Link, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    """A lasting one is an ERROR, and each further attempt waits for about the longest delay."""
    level = logging.ERROR if fault.lasting else logging.WARNING
    client = client_of(link)
    client.connect()
    fault.happen(link)
    link.proxy.cut()

    def failures() -> list[logging.LogRecord]:
        return [record for record in caplog.records if "next attempt" in record.message]

    eventually(lambda: len(failures()) >= 3)
    attempts = link.proxy.connections - 1
    client.shutdown(0.5)
    assert attempts <= len(failures()) * (1 if fault.lasting else 2), "two versions of MQTT may be tried"
    for record in failures():
        assert record.levelno == level
        assert fault.is_named_in(record.message, link), record.message
        if fault.lasting:
            assert MAX_DELAY / 2 - 0.001 <= record.delay <= MAX_DELAY  # type: ignore[attr-defined]


@pytest.mark.parametrize("scheme", ["mqtts", "wss"])
@pytest.mark.parametrize(
    ("shows", "says"),
    [
        (None, "the broker asks for a client certificate: set tls_cert and tls_key"),
        (EXPIRED, "it has expired"),
        (NOT_YET_VALID, "it is not valid yet, or not meant for clients"),
        ("stranger", "it is not signed by an authority that the broker trusts"),
    ],
    ids=["none", "expired", "not valid yet", "of a stranger"],
)
def test_mosquitto_refuses_a_certificate_and_that_is_named(
    make_client: Any, make_broker: Any, tmp_path: Path, scheme: str, shows: Any, says: str
) -> None:
    """In TLS 1.3 it does so after the handshake; behind wss:// we are about to ask for a websocket then."""
    authority = Authority(tmp_path)
    signer = Authority(tmp_path, "stranger") if shows == "stranger" else authority
    port = free_port()
    rules = ["require_certificate true", *(["protocol websockets"] if scheme == "wss" else [])]
    make_broker([*authority.listener(port, HOST), *rules])
    settings = {"tls_ca": authority.ca, "connect_timeout": 30.0}
    if shows is not None:
        settings |= signer.issue("client", "me@a.b", valid=shows if isinstance(shows, Validity) else VALID)
    client = make_client(f"{scheme}://localhost:{port}", **settings)
    with pytest.raises(ConnectError, match=f"no trusted connection to .*{says}"):
        client.connect()


# -- several brokers ----------------------------------------------------------------------


def test_a_broker_that_is_not_trusted_is_passed_over(link: Link) -> None:
    with ScriptedBroker(accept_and_serve, tls=link.authority.server_context(valid=EXPIRED)) as expired:
        urls = f"mqtts://localhost:{expired.port},{link.url}"
        with client_of(link, mqtt_url=urls, username="me") as client:
            assert client.connected


def test_when_no_broker_is_trusted_each_is_named_at_once(link: Link) -> None:
    with (
        ScriptedBroker(accept_and_serve, tls=link.authority.server_context(valid=EXPIRED)) as expired,
        ScriptedBroker(accept_and_serve, tls=link.stranger.server_context()) as strange,
    ):
        urls = f"mqtts://localhost:{expired.port},mqtts://localhost:{strange.port}"
        with pytest.raises(ConnectError) as caught:
            client_of(link, mqtt_url=urls, username="me", connect_timeout=30.0).connect()
    assert re.search(rf"{expired.port}.* has expired; .*{strange.port}.* is not signed by", str(caught.value))


def test_one_broker_that_may_come_back_is_waited_for_beside_one_that_is_not_trusted(link: Link) -> None:
    link.proxy.refuse()
    with ScriptedBroker(accept_and_serve, tls=link.authority.server_context(valid=EXPIRED)) as expired:
        client = client_of(link, mqtt_url=f"mqtts://localhost:{expired.port},{link.url}", username="me")
        threading.Timer(0.3, link.proxy.accept).start()
        with client:
            assert client.connected


# -- what is good -------------------------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_trusted_broker_is_connected_to_by_name_and_by_address(
    tmp_path: Path, host: str, version: ssl.TLSVersion
) -> None:
    with Link(tmp_path, host=host) as link:
        link.insist(version)
        with client_of(link) as client:
            assert client.connected


def test_without_tls_ca_the_system_s_authorities_are_trusted(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", link.settings.pop("tls_ca"))
    with client_of(link) as client:
        assert client.connected
    monkeypatch.setenv("SSL_CERT_FILE", link.stranger.ca)
    with pytest.raises(ConnectError, match="is not signed by the system's CAs"):
        client_of(link, connect_timeout=30.0).connect()


def test_the_zone_of_an_address_is_in_no_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    server = threading.Thread(
        target=lambda: authority.server_context("::1").wrap_socket(peer, server_side=True).close()
    )
    server.start()
    config = MQTTClientConfig("mqtts://[::1%25eth0]", "tls", tls_ca=authority.ca)
    secured = secure(ours, config.urls[0], config, Limit(time.monotonic() + 10, lambda: False))
    server.join(10)
    secured.close()


def test_a_connection_that_is_reset_before_the_handshake_is_closed() -> None:
    """Then the ssl module has taken the descriptor over already, and forgets it."""
    with socket.create_server((HOST, 0)) as server:
        ours = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        peer.close()
    eventually(lambda: is_reset(ours))
    descriptor = ours.fileno()
    config = MQTTClientConfig("mqtts://localhost", "tls")
    with pytest.raises(ConnectError, match="the peer hung up") as caught:
        secure(ours, config.urls[0], config, Limit(time.monotonic() + 10, lambda: False))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    del caught


def is_reset(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return True
    return False


def test_insecure_must_be_asked_for_and_warns_at_each_connection(
    link: Link, caplog: pytest.LogCaptureFixture
) -> None:
    def warnings() -> int:
        return sum(
            "tls_insecure" in record.message for record in caplog.records if record.levelname == "WARNING"
        )

    link.meet(link.stranger.server_context("other.example", valid=EXPIRED))
    with client_of(link, tls_insecure=True) as client:
        assert warnings() == 1
        link.proxy.cut()
        eventually(lambda: client.stats().reconnects == 1 and client.connected)
        assert warnings() == link.proxy.connections == 2


# -- files that change --------------------------------------------------------------------


def test_certificate_key_and_key_password_replaced_on_disk_are_used_at_the_next_reconnect(link: Link) -> None:
    before = serial_number(link.settings["tls_cert"])
    with client_of(link) as client:
        link.authority.issue("client", "renewed@example.org", password="another-secret")
        link.overwrite("tls_key_password_file", b"another-secret\r\n")
        after = serial_number(link.settings["tls_cert"])
        link.proxy.cut()
        eventually(lambda: client.stats().reconnects == 1 and client.connected)
    assert [connection.client_serial for connection in link.broker.connections] == [before, after]


def test_an_authority_replaced_on_disk_is_trusted_at_the_next_attempt(
    link: Link, caplog: pytest.LogCaptureFixture
) -> None:
    """The broker's certificate is of a new authority; until our file has it, it is refused, and then not."""
    with client_of(link) as client:
        link.meet(link.stranger.server_context())
        link.proxy.cut()
        eventually(lambda: "is not signed by tls_ca" in caplog.text)
        assert not client.connected
        link.overwrite("tls_ca", Path(link.stranger.ca).read_bytes())
        eventually(lambda: client.connected)


def test_a_file_that_is_mended_ends_the_outage(link: Link, caplog: pytest.LogCaptureFixture) -> None:
    key = Path(link.settings["tls_key"])
    good = key.read_bytes()
    with client_of(link) as client:
        key.write_bytes(b"half of a ke")
        link.proxy.cut()
        eventually(lambda: "is no PEM file of a private key" in caplog.text)
        key.write_bytes(good)
        eventually(lambda: client.connected)
