"""TLS: what a connection trusts, what it shows, and what its failures mean."""

from __future__ import annotations

import logging
import os
import selectors
import socket
import ssl
import time
import traceback
from pathlib import Path
from typing import Any

from tars_mqtt._core.dial import LastingError, await_ready, reason_of
from tars_mqtt._core.limit import Limit
from tars_mqtt.config import MQTTClientConfig
from tars_mqtt.errors import ConfigError, ConnectError
from tars_mqtt.url import BrokerURL

logger = logging.getLogger("tars_mqtt.session")

_MOST_PASSWORD_BYTES = 1024
"""What OpenSSL takes as the password of a key."""

_DAMAGED = ("BAD_RECORD_MAC", "DECODE_ERROR", "DECRYPT_ERROR", "INTERNAL_ERROR", "UNEXPECTED_MESSAGE")
"""Parts of the reasons that bytes spoilt on their way, or a broker in trouble, may have: the next attempt may
do better."""
_NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE")
_OLD_TLS = ("PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL", "VERSION_TOO_LOW")
_MISMATCH = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")

_NOT_YET_VALID, _EXPIRED = 9, 10
_UNKNOWN_AUTHORITY = (2, 18, 19, 20, 21)
_OTHER_HOST = (62, 64)


class TLSFailedError(LastingError):
    """One side does not trust the other, or they have no language in common."""


class _Socket(ssl.SSLSocket):
    """A TLS connection that says in the words of every other socket that nothing goes just now."""

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        try:
            return super().recv(buflen, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            raise BlockingIOError from error

    def send(self, data: Any, flags: int = 0) -> int:
        try:
            return super().send(data, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            raise BlockingIOError from error


def secure(sock: socket.socket, url: BrokerURL, config: MQTTClientConfig, limit: Limit) -> ssl.SSLSocket:
    """Do the TLS handshake on a connected, non-blocking socket.

    CAs, certificate and key are read from their files each time: whoever replaces them need not
    restart the service.

    Raises:
        ConfigError: A file of ours cannot be used; says which, and why.
        TLSFailedError: One side does not trust the other; says which, and why.
        ConnectError: The peer does not answer, or hangs up.
    """
    secured: ssl.SSLSocket | None = None
    try:
        context = _context(url, config)
        # The zone of an IPv6 address says which way to it, and is in no certificate.
        host = url.host.partition("%")[0]
        secured = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
        _shake_hands(secured, limit)
    except BaseException as error:
        (secured or sock).close()
        _close_lost(error)
        if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionError)):
            raise ConnectError(
                f"no TLS handshake with {url}: the peer hung up; check that its port is for TLS"
            ) from error
        if isinstance(error, ssl.SSLError):
            raise failure_of(error, url, config) from error
        if isinstance(error, OSError):
            raise ConnectError(f"no TLS handshake with {url}: {reason_of(error)}") from error
        raise
    return secured


def _close_lost(error: BaseException) -> None:
    """Close the socket that `wrap_socket` has taken over and then forgotten.

    It does where the peer has reset the connection by then. Nobody but its own frame still knows it, and the
    error keeps that alive.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        lost = frame.f_locals.get("self")
        if isinstance(lost, ssl.SSLSocket):
            lost.close()


def _shake_hands(secured: ssl.SSLSocket, limit: Limit) -> None:
    while True:
        try:
            return secured.do_handshake()
        except ssl.SSLWantReadError:
            await_ready(secured, selectors.EVENT_READ, limit)
        except ssl.SSLWantWriteError:
            await_ready(secured, selectors.EVENT_WRITE, limit)


# -- our files --------------------------------------------------------------------------------


def _context(url: BrokerURL, config: MQTTClientConfig) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=config.tls_ca)
    except ssl.SSLError as error:
        raise ConfigError([f"{_named(config, 'tls_ca')} is no PEM file of CA certificates"]) from error
    except OSError as error:
        raise _unreadable(config, "tls_ca", error) from error
    context.sslsocket_class = _Socket
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if config.tls_cert is not None:
        _show_certificate(context, config)
    if config.tls_insecure:
        logger.warning(
            "tls_insecure: any certificate is accepted as that of %s, an impostor's too",
            url.host,
            extra={"client_id": config.client_id},
        )
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _show_certificate(context: ssl.SSLContext, config: MQTTClientConfig) -> None:
    assert config.tls_cert is not None
    password = _key_password(config)
    asked = False

    def answer() -> bytes:
        # Also where there is no password: without this, OpenSSL would ask at the terminal.
        nonlocal asked
        asked = True
        return password

    try:
        context.load_cert_chain(config.tls_cert, config.tls_key, answer)
    except ssl.SSLError as error:
        raise ConfigError([_problem(config, error, asked)]) from error
    except OSError as error:
        for name in ("tls_cert", "tls_key"):
            _read(config, name, 1)
        raise _unreadable(config, "tls_cert", error) from error


def _problem(config: MQTTClientConfig, error: ssl.SSLError, asked_for_password: bool) -> str:
    """Why certificate and key, which can be read, cannot be used."""
    certificate, key = _named(config, "tls_cert"), _named(config, "tls_key")
    if asked_for_password:
        if config.tls_key_password_file is None:
            return f"{key} is encrypted: set tls_key_password_file"
        return f"{_named(config, 'tls_key_password_file')} does not hold the password of {key}"
    reason = error.reason or ""
    if reason in _MISMATCH:
        return f"{key} does not belong to {certificate}"
    if "TOO_SMALL" in reason or "TOO_WEAK" in reason:
        return f"{certificate} is too weak: {reason_of(error)}"
    try:
        # The same parser, for the certificate alone.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(config.tls_cert)
    except ssl.SSLError:
        return f"{certificate} is no PEM file of a certificate"
    return f"{key} is no PEM file of a private key"


def _key_password(config: MQTTClientConfig) -> bytes:
    """As bytes: decoding could fail, with an error that carries what it could not decode."""
    if config.tls_key_password_file is None:
        return b""
    password = _read(config, "tls_key_password_file", _MOST_PASSWORD_BYTES + 3)
    password = password.removesuffix(b"\n").removesuffix(b"\r")
    if not password or len(password) > _MOST_PASSWORD_BYTES:
        problem = "is empty" if not password else f"holds more than {_MOST_PASSWORD_BYTES:,} bytes"
        raise ConfigError([f"{_named(config, 'tls_key_password_file')} {problem}"])
    return password


def _read(config: MQTTClientConfig, name: str, size: int) -> bytes:
    try:
        with Path(getattr(config, name)).open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise _unreadable(config, name, error) from error


def _unreadable(config: MQTTClientConfig, name: str, error: OSError) -> ConfigError:
    return ConfigError([f"{_named(config, name)} cannot be read: {reason_of(error)}"])


def _named(config: MQTTClientConfig, name: str) -> str:
    return f"{name} {os.fspath(getattr(config, name))!r}"


# -- what a failure means -----------------------------------------------------------------------


def failure_of(error: ssl.SSLError, url: BrokerURL, config: MQTTClientConfig) -> ConnectError:
    """The error that says in one sentence what went wrong, and for which host or file."""
    reason = error.reason or ""
    if any(word in reason for word in _DAMAGED):
        return ConnectError(f"no TLS connection to {url}: {reason_of(error)}")
    explanation = (
        _explain_verdict(error, url.host, config)
        if isinstance(error, ssl.SSLCertVerificationError)
        else _explain(error, url, config)
    )
    return TLSFailedError(f"no trusted connection to {url}: {explanation}")


def _explain(error: ssl.SSLError, url: BrokerURL, config: MQTTClientConfig) -> str:
    reason = error.reason or ""
    if any(word in reason for word in _NO_TLS):
        return "the peer does not speak TLS: check scheme and port of mqtt_url"
    if any(word in reason for word in _OLD_TLS):
        return f"the broker at {url.host} speaks nothing newer than TLS 1.1, which is not secure any more"
    if "ALERT" not in reason:
        return f"the handshake failed: {reason_of(error)}"
    if "CERTIFICATE" in reason or "UNKNOWN_CA" in reason or "HANDSHAKE_FAILURE" in reason:
        return _explain_refusal(reason, config)
    return f"the broker refused the handshake: {reason_of(error)}"


def _explain_refusal(reason: str, config: MQTTClientConfig) -> str:
    """What a broker has against the certificate that we show, or do not show."""
    if config.tls_cert is None:
        if "HANDSHAKE_FAILURE" in reason:
            return (
                "the broker asks for a client certificate, or has no cipher in common with us: "
                "set tls_cert and tls_key"
            )
        return "the broker asks for a client certificate: set tls_cert and tls_key"
    if "CERTIFICATE_REQUIRED" in reason or "HANDSHAKE_FAILURE" in reason:
        why = "it is of a kind that the broker does not take, or they have no cipher in common"
    elif "EXPIRED" in reason:
        why = "it has expired"
    elif "REVOKED" in reason:
        why = "it has been revoked"
    elif "UNKNOWN_CA" in reason:
        why = "it is not signed by an authority that the broker trusts"
    else:
        why = "it is not valid yet, or not meant for clients"
    return f"the broker refused our certificate, {_named(config, 'tls_cert')}: {why}"


def _explain_verdict(error: ssl.SSLCertVerificationError, host: str, config: MQTTClientConfig) -> str:
    if error.verify_code in (_NOT_YET_VALID, _EXPIRED):
        what = "has expired" if error.verify_code == _EXPIRED else "is not valid yet"
        if _has_invalid_authority(config):
            return f"a certificate in {_named(config, 'tls_ca')} {what}"
        return f"the certificate of {host} {what}"
    if error.verify_code in _UNKNOWN_AUTHORITY:
        trusted = _named(config, "tls_ca") if config.tls_ca else "the system's CAs"
        return f"the certificate of {host} is not signed by {trusted} ({error.verify_message})"
    if error.verify_code in _OTHER_HOST:
        return f"the certificate is for another host than {host}"
    return f"the certificate of {host} is not trusted: {error.verify_message}"


def _has_invalid_authority(config: MQTTClientConfig) -> bool:
    """Whether one of `tls_ca` itself is the one that is out of date: OpenSSL does not say which it means."""
    if config.tls_ca is None:
        return False
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(config.tls_ca)
    now = time.time()
    return any(
        not ssl.cert_time_to_seconds(str(each["notBefore"]))
        <= now
        <= ssl.cert_time_to_seconds(str(each["notAfter"]))
        for each in context.get_ca_certs()
    )
