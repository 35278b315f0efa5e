"""Every way in: TLS, client certificates, websockets, Unix sockets; and what is said when one is wrong."""

from __future__ import annotations

import datetime
import threading
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trustme

from tars_mqtt import ConnectError, MQTTClient
from tests.support.port import HOST, free_port
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support import Broker

QUICK = {"reconnect_min_delay": 0.1, "reconnect_max_delay": 0.5, "session_expiry": 0, "shutdown_timeout": 2.0}


@attrs.frozen
class Certificates:
    """Files of one certificate authority, made for the test."""

    folder: Path
    authority: trustme.CA

    def issue(self, name: str, *identities: str, expired: bool = False) -> dict[str, str]:
        past = datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC)
        certificate = self.authority.issue_cert(*identities, not_after=past if expired else None)
        key, chain = self.folder / f"{name}.key", self.folder / f"{name}.pem"
        certificate.private_key_pem.write_to_path(key)
        chain.write_bytes(b"".join(part.bytes() for part in certificate.cert_chain_pems))
        return {"tls_cert": str(chain), "tls_key": str(key)}

    @property
    def ca(self) -> str:
        path = self.folder / "ca.pem"
        self.authority.cert_pem.write_to_path(path)
        return str(path)


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path, trustme.CA())


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
def doors(make_broker: Callable[..., Broker], certificates: Certificates, tmp_path: Path) -> Doors:
    server = certificates.issue("server", "localhost")
    secured = [
        f"cafile {certificates.ca}",
        f"certfile {server['tls_cert']}",
        f"keyfile {server['tls_key']}",
    ]
    ports = [free_port() for _ in range(4)]
    socket = str(tmp_path / "mosquitto.sock")
    return Doors(
        make_broker(
            [
                f"listener {ports[0]} {HOST}",
                *secured,
                f"listener {ports[1]} {HOST}",
                *secured,
                "require_certificate true",
                f"listener {ports[2]} {HOST}",
                "protocol websockets",
                f"listener {ports[3]} {HOST}",
                "protocol websockets",
                *secured,
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


def refused(url: str, **settings: Any) -> str:
    """The error of the first connect, which comes at once and leaves nothing behind."""
    client = MQTTClient(url, "refused", **QUICK, connect_timeout=30.0, **settings)
    with pytest.raises(ConnectError) as caught:
        client.connect()
    assert not [thread for thread in threading.enumerate() if "tars-mqtt/refused" in thread.name]
    return str(caught.value)


def test_tls(make_client, doors: Doors, certificates: Certificates) -> None:
    works(make_client, f"mqtts://localhost:{doors.tls}", tls_ca=certificates.ca)


def test_tls_with_a_client_certificate(make_client, doors: Doors, certificates: Certificates) -> None:
    client = certificates.issue("client", "service@example.org")
    works(make_client, f"mqtts://localhost:{doors.tls_client}", tls_ca=certificates.ca, **client)


def test_websockets(make_client, doors: Doors) -> None:
    works(make_client, f"ws://localhost:{doors.websocket}/mqtt")


def test_websockets_over_tls(make_client, doors: Doors, certificates: Certificates) -> None:
    works(make_client, f"wss://localhost:{doors.tls_websocket}/mqtt", tls_ca=certificates.ca)


def test_a_unix_socket(make_client, doors: Doors) -> None:
    works(make_client, f"mqtt+unix://{doors.socket}")


def test_insecure_must_be_asked_for_and_warns(
    make_client, doors: Doors, caplog: pytest.LogCaptureFixture
) -> None:
    works(make_client, f"mqtts://{HOST}:{doors.tls}", tls_insecure=True)
    assert any("tls_insecure" in record.message for record in caplog.records if record.levelname == "WARNING")


def test_an_unknown_authority_is_named(doors: Doors, certificates: Certificates, tmp_path: Path) -> None:
    url = f"mqtts://localhost:{doors.tls}"
    assert "is not signed by the system's CAs" in refused(url)
    other = Certificates(tmp_path / "other", trustme.CA())
    other.folder.mkdir()
    assert f"is not signed by tls_ca {other.ca!r}" in refused(url, tls_ca=other.ca)


def test_a_certificate_of_another_host_is_named(doors: Doors, certificates: Certificates) -> None:
    error = refused(f"mqtts://{HOST}:{doors.tls}", tls_ca=certificates.ca)
    assert f"the certificate is for another host than {HOST}" in error


def test_an_expired_certificate_is_named(make_broker, certificates: Certificates) -> None:
    expired = certificates.issue("expired", "localhost", expired=True)
    port = free_port()
    make_broker(
        [
            f"listener {port} {HOST}",
            f"certfile {expired['tls_cert']}",
            f"keyfile {expired['tls_key']}",
        ]
    )
    assert "the certificate of localhost has expired" in refused(
        f"mqtts://localhost:{port}", tls_ca=certificates.ca
    )


def test_a_missing_client_certificate_is_named(doors: Doors, certificates: Certificates) -> None:
    error = refused(f"mqtts://localhost:{doors.tls_client}", tls_ca=certificates.ca)
    assert "the broker asks for a client certificate: set tls_cert and tls_key" in error


def test_a_refused_client_certificate_is_named(
    doors: Doors, certificates: Certificates, tmp_path: Path
) -> None:
    stranger = Certificates(tmp_path / "stranger", trustme.CA())
    stranger.folder.mkdir()
    shown = stranger.issue("client", "service@example.org")
    error = refused(f"mqtts://localhost:{doors.tls_client}", tls_ca=certificates.ca, **shown)
    assert f"the broker refused our certificate {shown['tls_cert']!r}" in error


def test_an_expired_client_certificate_is_named(doors: Doors, certificates: Certificates) -> None:
    shown = certificates.issue("client", "service@example.org", expired=True)
    error = refused(f"mqtts://localhost:{doors.tls_client}", tls_ca=certificates.ca, **shown)
    assert f"the broker refused our certificate {shown['tls_cert']!r}: it has expired" in error


def test_files_that_cannot_be_used_are_named(doors: Doors, certificates: Certificates) -> None:
    url = f"mqtts://localhost:{doors.tls}"
    assert "tls_ca '/nowhere.pem' cannot be used" in refused(url, tls_ca="/nowhere.pem")
    one, two = certificates.issue("one", "a@b"), certificates.issue("two", "a@b")
    mixed = {"tls_cert": one["tls_cert"], "tls_key": two["tls_key"]}
    assert "tls_key does not belong to it" in refused(url, tls_ca=certificates.ca, **mixed)


def test_a_replaced_certificate_is_used_at_the_next_reconnect(
    doors: Doors, certificates: Certificates
) -> None:
    """Files are read again at every attempt: rotation needs no restart."""
    shown = certificates.issue("client", "service@example.org")
    with MQTTClient(
        f"mqtts://localhost:{doors.tls_client}", "rotate", tls_ca=certificates.ca, **shown, **QUICK
    ) as client:
        certificates.issue("client", "renewed@example.org")
        doors.broker.restart()
        eventually(lambda: client.stats().reconnects == 1 and client.connected)


def test_tls_to_a_port_without_tls_and_the_other_way_round_is_an_error(
    doors: Doors, certificates: Certificates
) -> None:
    for url in (f"mqtts://localhost:{doors.broker.port}", f"mqtt://localhost:{doors.tls}"):
        settings = {"tls_ca": certificates.ca} if url.startswith("mqtts") else {}
        client = MQTTClient(url, "wrong-door", **QUICK, **settings)
        with pytest.raises(ConnectError):
            client.connect(timeout=0.5)
