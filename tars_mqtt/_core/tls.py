"""TLS: what a connection trusts, what it shows, and what its failures mean."""

from __future__ import annotations

import logging
import os
import selectors
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

from tars_mqtt._core.dial import await_ready, reason_of
from tars_mqtt.config import MQTTClientConfig
from tars_mqtt.errors import ConnectError
from tars_mqtt.url import BrokerURL

logger = logging.getLogger("tars_mqtt.session")

_OURS = ("UNKNOWN_CA", "BAD_CERTIFICATE", "CERTIFICATE_UNKNOWN", "HANDSHAKE_FAILURE")
"""Alerts by which a broker says that it does not like our certificate, or misses one."""


class TLSFailedError(ConnectError):
    """No trusted connection came about. Trying again will not cure it before somebody mends a file."""


def secure(
    sock: socket.socket,
    url: BrokerURL,
    config: MQTTClientConfig,
    deadline: float,
    interrupted: Callable[[], bool],
) -> ssl.SSLSocket:
    """Do the TLS handshake on a connected, non-blocking socket.

    CAs, certificate and key are read from their files each time: whoever replaces them need not
    restart the service.

    Raises:
        TLSFailedError: A file cannot be used, or one side does not trust the other; says which.
        ConnectError: The peer does not answer, or hangs up.
    """
    try:
        secured = _context(url, config).wrap_socket(
            sock, server_hostname=url.host, do_handshake_on_connect=False
        )
    except BaseException:
        sock.close()
        raise
    try:
        while True:
            try:
                secured.do_handshake()
            except ssl.SSLWantReadError:
                await_ready(secured, selectors.EVENT_READ, deadline, interrupted)
            except ssl.SSLWantWriteError:
                await_ready(secured, selectors.EVENT_WRITE, deadline, interrupted)
            else:
                return secured
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
        secured.close()
        raise ConnectError(f"no TLS handshake with {url}: the peer hung up") from error
    except ssl.SSLError as error:
        secured.close()
        raise TLSFailedError(f"no trusted connection to {url}: {explain(error, url, config)}") from error
    except OSError as error:
        secured.close()
        raise ConnectError(f"no TLS handshake with {url}: {reason_of(error)}") from error
    except BaseException:
        secured.close()
        raise


def _context(url: BrokerURL, config: MQTTClientConfig) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=config.tls_ca)
    except (OSError, ssl.SSLError) as error:
        raise _bad_file("tls_ca", config.tls_ca, "no readable PEM file of CA certificates") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if config.tls_cert is not None:
        password = _key_password(config)
        try:
            context.load_cert_chain(config.tls_cert, config.tls_key, lambda: password)
        except (OSError, ssl.SSLError, ValueError) as error:
            reason = (
                "tls_key does not belong to it"
                if "mismatch" in str(error).lower()
                else "it or its tls_key cannot be read, or the key's password is wrong"
            )
            raise _bad_file("tls_cert", config.tls_cert, reason) from error
    if config.tls_insecure:
        logger.warning(
            "tls_insecure: any certificate is accepted as that of %s, an impostor's too",
            url.host,
            extra={"client_id": config.client_id},
        )
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _key_password(config: MQTTClientConfig) -> str:
    path = config.tls_key_password_file
    if path is None:
        return ""
    try:
        return Path(path).read_text().removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _bad_file("tls_key_password_file", path, "it cannot be read") from error


def _bad_file(name: str, path: str | os.PathLike[str] | None, reason: str) -> TLSFailedError:
    return TLSFailedError(f"{name} {os.fspath(path or '')!r} cannot be used: {reason}")


def explain(error: ssl.SSLError, url: BrokerURL, config: MQTTClientConfig) -> str:
    """Say in one sentence what went wrong, and for which host or file."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _explain_verdict(error, url.host, config)
    reason = error.reason or str(error)
    words = reason.lower().replace("_", " ")
    shown = f"our certificate {os.fspath(config.tls_cert)!r}" if config.tls_cert else "the connection"
    if "CERTIFICATE_REQUIRED" in reason:
        return "the broker asks for a client certificate: set tls_cert and tls_key"
    if "ALERT" in reason and "EXPIRED" in reason:
        return f"the broker refused {shown}: it has expired"
    if "ALERT" in reason and any(word in reason for word in _OURS):
        return f"the broker refused {shown} ({words}): check tls_cert and tls_key"
    if "WRONG_VERSION_NUMBER" in reason or "HTTP_REQUEST" in reason:
        return "the peer does not speak TLS: check scheme and port of mqtt_url"
    return f"the handshake failed: {words}"


def _explain_verdict(error: ssl.SSLCertVerificationError, host: str, config: MQTTClientConfig) -> str:
    trusted = f"tls_ca {os.fspath(config.tls_ca)!r}" if config.tls_ca else "the system's CAs"
    match error.verify_code:
        case 9:
            return f"the certificate of {host} is not valid yet"
        case 10:
            return f"the certificate of {host} has expired"
        case 18 | 19 | 20 | 21:
            return f"the certificate of {host} is not signed by {trusted} ({error.verify_message})"
        case 62 | 64:
            return f"the certificate is for another host than {host}"
    return f"the certificate of {host} is not trusted: {error.verify_message}"
