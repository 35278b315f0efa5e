"""Everything that can be wrong with TLS, as something that happens to a connection that was good before.

A `Link` is such a connection: a client's settings, with files in a folder, and a way to a broker that trusts
and is trusted. Each of `FAULTS` spoils one thing about it, and knows the sentence that the client has to say.
"""

from __future__ import annotations

import contextlib
import re
import ssl
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tars_mqtt import ConfigError, ConnectError
from tests.support.broker import Broker
from tests.support.certificate import EXPIRED, NOT_YET_VALID, VALID, Authority, Validity
from tests.support.port import HOST, free_port
from tests.support.proxy import FaultProxy
from tests.support.scripted import ScriptedBroker, ScriptedConnection, accept_and_serve

if TYPE_CHECKING:
    from collections.abc import Callable

SECRETS = ("url-secret", "file-secret", "key-secret")
"""The passwords in the settings of a `Link`. All begin and end alike, to be searched for."""


class Link(contextlib.ExitStack):
    """A client's way to a broker over TLS, through a proxy that can be led elsewhere.

    Attributes:
        url: For the client.
        settings: For the client: what it trusts, what it shows, and more secrets than it needs.
        authority: Has signed both sides' certificates.
        stranger: An authority that nobody trusts.
        proxy: Between the two.
    """

    def __init__(
        self,
        folder: Path,
        *,
        shows: bool = True,
        encrypted: bool = True,
        scheme: str = "mqtts",
        host: str = "localhost",
    ) -> None:
        super().__init__()
        self.folder = folder
        self.authority = Authority(folder)
        self.stranger = Authority(folder, "stranger")
        self.broker = self.enter_context(ScriptedBroker(accept_and_serve, tls=self._context(scheme, shows)))
        self.proxy = self.enter_context(FaultProxy(self.broker.url))
        self.url = f"{scheme}://me:{SECRETS[0]}@{host}:{self.proxy.port}"
        self.settings: dict[str, Any] = {"password_file": self._file("password", SECRETS[1])}
        if scheme != "mqtt":
            self.settings["tls_ca"] = self.authority.ca
        if shows:
            password = SECRETS[2] if encrypted else ""
            self.settings |= self.authority.issue("client", "me@example.org", password=password)
            if encrypted:
                self.settings["tls_key_password_file"] = self._file("key-password", password)

    def _context(self, scheme: str, shows: bool) -> ssl.SSLContext | None:
        return None if scheme == "mqtt" else self.authority.server_context(require_certificate=shows)

    def _file(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(text + "\n")
        return str(path)

    # -- what can happen to it --------------------------------------------------------------

    def meet(self, context: ssl.SSLContext | None) -> None:
        """From now on the client meets another server, with this certificate and these rules."""
        self.proxy.redirect(self.enter_context(ScriptedBroker(accept_and_serve, tls=context)).url)

    def meet_mosquitto(self, config: list[str], port: int | None = None) -> None:
        """From now on the client meets a mosquitto; on another port than its first with *port*."""
        broker = self.enter_context(Broker(config))
        self.proxy.redirect(f"mqtt://{HOST}:{port or broker.port}")

    def show(self, authority: Authority, version: ssl.TLSVersion, valid: Validity = VALID) -> None:
        """From now on the client shows another certificate, and the broker insists on this version of TLS."""
        authority.issue("client", "me@example.org", password=SECRETS[2], valid=valid)
        self.insist(version)

    def insist(self, version: ssl.TLSVersion) -> None:
        """From now on the broker asks for a client certificate, with this version of TLS."""
        context = self.authority.server_context(require_certificate=True)
        context.minimum_version = context.maximum_version = version
        self.meet(context)

    def overwrite(self, setting: str, data: bytes) -> None:
        """Spoil one of the client's files."""
        Path(self.settings[setting]).write_bytes(data)

    def remove(self, setting: str) -> None:
        """Delete one of the client's files."""
        Path(self.settings[setting]).unlink()


@attrs.frozen
class Fault:
    """One thing that goes wrong.

    Attributes:
        name: What it is.
        happen: Does it to a `Link`.
        says: Part of the sentence that names it; ``…`` stands for anything, ``{folder}`` for the link's.
        error: What `connect` raises.
        link: How the link is to be.
        lasting: Whether trying again cannot cure it: then the first `connect` raises at once.
    """

    name: str
    happen: Callable[[Link], object]
    says: str
    error: type[Exception] = ConnectError
    link: dict[str, Any] = attrs.field(factory=dict)
    lasting: bool = True

    def is_named_in(self, text: str, link: Link) -> bool:
        pattern = re.escape(self.says.replace("{folder}", str(link.folder))).replace("…", ".*")
        return re.search(pattern, text) is not None


def _old_tls(link: Link) -> None:
    context = link.authority.server_context()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    link.meet(context)


def _http(link: Link) -> None:
    def answer(connection: ScriptedConnection) -> None:
        connection.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        connection.ignore()

    link.proxy.redirect(link.enter_context(ScriptedBroker(answer)).url)


def _tls_listener(link: Link) -> None:
    port = free_port()
    link.meet_mosquitto(link.authority.listener(port, HOST), port)


def _refused(name: str, why: str, authority: str = "authority", valid: Validity = VALID) -> list[Fault]:
    says = f"the broker refused our certificate, tls_cert '{{folder}}/client.pem': {why}"

    def showing(version: ssl.TLSVersion) -> Callable[[Link], None]:
        return lambda link: link.show(getattr(link, authority), version, valid)

    return [
        Fault(f"{name}, TLS 1.3", showing(ssl.TLSVersion.TLSv1_3), says),
        Fault(f"{name}, TLS 1.2", showing(ssl.TLSVersion.TLSv1_2), says),
    ]


FAULTS = [
    # -- the broker's certificate
    Fault(
        "expired certificate of the broker",
        lambda link: link.meet(link.authority.server_context(valid=EXPIRED)),
        "the certificate of localhost has expired",
    ),
    Fault(
        "certificate of the broker not valid yet",
        lambda link: link.meet(link.authority.server_context(valid=NOT_YET_VALID)),
        "the certificate of localhost is not valid yet",
    ),
    Fault(
        "certificate of another host",
        lambda link: link.meet(link.authority.server_context("other.example")),
        "the certificate is for another host than localhost",
    ),
    Fault(
        "certificate of another IP address",
        lambda link: link.meet(link.authority.server_context("localhost", "127.0.0.2")),
        "the certificate is for another host than 127.0.0.1",
        link={"host": HOST},
    ),
    Fault(
        "certificate of an unknown CA",
        lambda link: link.meet(link.stranger.server_context()),
        "the certificate of localhost is not signed by tls_ca '{folder}/ca.pem'",
    ),
    Fault(
        "expired CA",
        lambda link: link.authority.let_expire(),
        "a certificate in tls_ca '{folder}/ca.pem' has expired",
    ),
    # -- the client's certificate
    Fault(
        "no client certificate, TLS 1.3",
        lambda link: link.insist(ssl.TLSVersion.TLSv1_3),
        "the broker asks for a client certificate: set tls_cert and tls_key",
        link={"shows": False},
    ),
    Fault(
        "no client certificate, TLS 1.2",
        lambda link: link.insist(ssl.TLSVersion.TLSv1_2),
        "the broker asks for a client certificate, or has no cipher in common with us: set tls_cert",
        link={"shows": False},
    ),
    *_refused("expired client certificate", "it has expired", valid=EXPIRED),
    *_refused("client certificate not valid yet", "it is not valid yet", valid=NOT_YET_VALID),
    *_refused(
        "client certificate of an unknown CA",
        "it is not signed by an authority that the broker trusts",
        authority="stranger",
    ),
    # -- the language
    Fault("TLS 1.1 only", _old_tls, "the broker at localhost speaks nothing newer than TLS 1.1"),
    Fault("HTTP server behind mqtts://", _http, "the peer does not speak TLS: check scheme and port"),
    Fault(
        "MQTT without TLS behind mqtts://",
        lambda link: link.meet_mosquitto([]),
        "the peer hung up; check that its port is for TLS",
        lasting=False,
    ),
    Fault(
        "TLS behind mqtt://",
        _tls_listener,
        "write mqtts:// if that is a port for TLS",
        link={"scheme": "mqtt", "shows": False},
        lasting=False,
    ),
    # -- our files
    Fault(
        "wrong key password",
        lambda link: link.overwrite("tls_key_password_file", b"wrong-secret\n"),
        "tls_key_password_file '{folder}/key-password' does not hold the password of "
        "tls_key '{folder}/client.key'",
        ConfigError,
    ),
    Fault(
        "empty key password file",
        lambda link: link.overwrite("tls_key_password_file", b"\n"),
        "tls_key_password_file '{folder}/key-password' is empty",
        ConfigError,
    ),
    Fault(
        "encrypted key, no key password file",
        lambda link: link.authority.issue("client", "me@example.org", password=SECRETS[2]),
        "tls_key '{folder}/client.key' is encrypted: set tls_key_password_file",
        ConfigError,
        link={"encrypted": False},
    ),
    Fault(
        "key of another certificate",
        lambda link: link.overwrite(
            "tls_key", Path(link.authority.issue("other", "me@example.org")["tls_key"]).read_bytes()
        ),
        "tls_key '{folder}/client.key' does not belong to tls_cert '{folder}/client.pem'",
        ConfigError,
    ),
    *(
        Fault(
            f"{setting} missing",
            lambda link, setting=setting: link.remove(setting),  # type: ignore[misc]
            f"{setting} '{{folder}}/{file}' cannot be read: no such file or directory",
            ConfigError,
        )
        for setting, file in (
            ("tls_ca", "ca.pem"),
            ("tls_cert", "client.pem"),
            ("tls_key", "client.key"),
            ("tls_key_password_file", "key-password"),
        )
    ),
    *(
        Fault(
            f"{setting} garbled",
            lambda link, setting=setting: link.overwrite(  # type: ignore[misc]
                setting, Path(link.settings[setting]).read_bytes().replace(b"A", b"?")
            ),
            f"{setting} '{{folder}}/{file}' is no PEM file of {content}",
            ConfigError,
        )
        for setting, file, content in (
            ("tls_ca", "ca.pem", "CA certificates"),
            ("tls_cert", "client.pem", "a certificate"),
        )
    ),
    Fault(
        "tls_key garbled",
        lambda link: link.overwrite("tls_key", b"-----BEGIN PRIVATE KEY-----\nhello\n"),
        "tls_key '{folder}/client.key' is no PEM file of a private key",
        ConfigError,
    ),
]
