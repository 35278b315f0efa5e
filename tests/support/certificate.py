"""Certificates made for a test: an authority of its own, and files of what it has signed, good and bad."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path
from typing import NamedTuple

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


class Validity(NamedTuple):
    """From when until when a certificate is valid."""

    not_before: datetime.datetime
    not_after: datetime.datetime


VALID = Validity(NOW - DAY, NOW + 30 * DAY)
EXPIRED = Validity(NOW - 30 * DAY, NOW - DAY)
NOT_YET_VALID = Validity(NOW + DAY, NOW + 30 * DAY)


class Authority:
    """A certificate authority, with a folder for its files.

    Attributes:
        ca: The file with its certificate.
    """

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder = folder
        self._authority = trustme.CA()
        self.ca = str(folder / f"{name}.pem")
        self._authority.cert_pem.write_to_path(self.ca)

    def issue(
        self,
        name: str,
        *identities: str,
        common_name: str | None = None,
        password: str = "",
        valid: Validity = VALID,
    ) -> dict[str, str]:
        """Write a certificate and its key under *name*, over what is there; returns them as settings.

        Args:
            identities: Host names, IP addresses, or an address with an ``@`` for a client.
            common_name: Who it is for, as mosquitto understands a client's.
            password: Encrypts the key.
        """
        issued = self._authority.issue_cert(*identities, common_name=common_name, **valid._asdict())
        key = issued.private_key_pem.bytes()
        if password:
            encryption = BestAvailableEncryption(password.encode())
            key = load_pem_private_key(key, None).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
        chain = b"".join(part.bytes() for part in issued.cert_chain_pems)
        paths = {"tls_cert": self._folder / f"{name}.pem", "tls_key": self._folder / f"{name}.key"}
        paths["tls_cert"].write_bytes(chain)
        paths["tls_key"].write_bytes(key)
        return {setting: str(path) for setting, path in paths.items()}

    def let_expire(self) -> None:
        """Write its own certificate anew, with the same key, as one that has expired."""
        old = x509.load_pem_x509_certificate(self._authority.cert_pem.bytes())
        builder = x509.CertificateBuilder(
            issuer_name=old.issuer,
            subject_name=old.subject,
            public_key=old.public_key(),
            serial_number=old.serial_number,
            not_valid_before=EXPIRED.not_before,
            not_valid_after=EXPIRED.not_after,
            extensions=list(old.extensions),
        )
        key = load_pem_private_key(self._authority.private_key_pem.bytes(), None)
        new = builder.sign(key, hashes.SHA256())  # type: ignore[arg-type]
        Path(self.ca).write_bytes(new.public_bytes(Encoding.PEM))

    def listener(self, port: int, host: str, *identities: str, valid: Validity = VALID) -> list[str]:
        """Lines for mosquitto.conf: a listener with TLS."""
        shown = self.issue(f"server-{port}", *(identities or ("localhost", "127.0.0.1")), valid=valid)
        return [
            f"listener {port} {host}",
            f"cafile {self.ca}",
            f"certfile {shown['tls_cert']}",
            f"keyfile {shown['tls_key']}",
        ]

    def server_context(
        self, *identities: str, require_certificate: bool = False, valid: Validity = VALID
    ) -> ssl.SSLContext:
        """What a TLS server of Python needs."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        issued = self._authority.issue_cert(*(identities or ("localhost", "127.0.0.1")), **valid._asdict())
        issued.configure_cert(context)
        if require_certificate:
            self._authority.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def serial_number(pem_file: str) -> int:
    """That of the first certificate in a file."""
    return x509.load_pem_x509_certificate(Path(pem_file).read_bytes()).serial_number
