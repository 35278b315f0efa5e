"""MQTT inside the frames of a websocket [RFC 6455], [MQTT-6]."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import socket
import struct
from collections.abc import Mapping

from tars_mqtt._core.dial import reason_of
from tars_mqtt._core.exchange import Exchange
from tars_mqtt._core.limit import Limit
from tars_mqtt._core.stream import TLSAlertError, is_alert
from tars_mqtt._core.wire import MalformedPacketError
from tars_mqtt.errors import ConnectError
from tars_mqtt.url import BrokerURL

_BINARY, _CLOSE, _PING, _PONG = 0x2, 0x8, 0x9, 0xA
_OPCODES = frozenset((0x0, _BINARY, _CLOSE, _PING, _PONG))
"""Of frames that a broker may send: no text [MQTT-6.0.0-1]."""
_FINAL = 0x80
_MASKED = 0x80
_MOST_CONTROL_BYTES = 125
_FRAME_BYTES = 65_536
"""What one frame of ours carries at most: what a slow link takes shows frame by frame."""

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class Websocket:
    """What looks like a non-blocking socket inside the frames of one.

    No frame is collected: what has arrived of it is handed on, whatever length it claims.
    Owned by the network thread.
    """

    def __init__(self, sock: socket.socket, unread: bytes = b"") -> None:
        self._socket = sock
        self._unread = unread
        self._left = 0
        self._opcode = _BINARY
        self._control = b""
        self._closed = False
        self._outgoing = b""
        self._carried = 0
        self._answer = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def pending(self) -> int:
        """Bytes, or more, that can be read though no selector says so; 1 at the end of the stream."""
        if self._closed or self._is_decodable(self._unread):
            return 1
        inner = getattr(self._socket, "pending", None)
        return 0 if inner is None else int(inner())

    def close(self) -> None:
        self._socket.close()

    def recv(self, size: int) -> bytes:
        """At most *size* bytes of payload; empty at the end of the stream.

        Raises:
            BlockingIOError: There is nothing yet.
            MalformedPacketError: What arrived is no frame that a broker may send.
            OSError: The socket failed.
        """
        if self._closed:
            return b""
        if not self._is_decodable(self._unread):
            received = self._socket.recv(max(1, size - len(self._unread)))
            if not received:
                return b""
            self._unread += received
        payload = self._decode()
        self._send_answer()
        if not payload and not self._closed:
            raise BlockingIOError  # not another look: pings without end would hold the thread
        return payload

    def send(self, data: bytes | memoryview) -> int:
        """Send the first of *data*; until that has left, the caller must come with the same bytes again.

        Raises:
            BlockingIOError: The socket is full.
            OSError: The socket failed.
        """
        if not self._carried:
            piece = bytes(data[:_FRAME_BYTES])
            self._outgoing += _frame(_BINARY, piece)
            self._carried = len(piece)
        self._flush()
        carried, self._carried = self._carried, 0
        self._send_answer()
        return carried

    # -- inside -----------------------------------------------------------------------------

    def _is_decodable(self, data: bytes) -> bool:
        return bool(data) and (self._left > 0 or len(data) >= _header_bytes(data))

    def _decode(self) -> bytes:
        """Take in what is unread, but for a header that is not whole; return the payload in it."""
        data, self._unread = self._unread, b""
        payload: list[bytes] = []
        position = 0
        while position < len(data) and not self._closed:
            if not self._left:
                start = position + _header_bytes(data[position : position + 2])
                if start > len(data):
                    self._unread = data[position:]
                    break
                self._opcode, self._left = _read_header(data[position:start])
                position = start
            piece = data[position : position + self._left]
            position += len(piece)
            self._left -= len(piece)
            if self._opcode >= _CLOSE:
                self._control += piece
                if not self._left:
                    self._on_control()
            elif piece:
                payload.append(piece)
        return b"".join(payload)

    def _on_control(self) -> None:
        content, self._control = self._control, b""
        if self._opcode == _PING:
            # Only the last of several has to be answered: what we owe stays small.
            self._answer = _frame(_PONG, content)
        elif self._opcode == _CLOSE:
            self._answer = _frame(_CLOSE, content[:2])
            self._closed = True

    def _send_answer(self) -> None:
        if self._carried:
            return  # in the middle of a frame
        if not self._outgoing:
            self._outgoing, self._answer = self._answer, b""
        # What is wrong with the socket shows when it is read, or written in earnest.
        with contextlib.suppress(OSError):
            self._flush()

    def _flush(self) -> None:
        while self._outgoing:
            self._outgoing = self._outgoing[self._socket.send(self._outgoing) :]


def _header_bytes(start: bytes) -> int:
    """How long a frame's header is, as its first two bytes tell."""
    if len(start) < 2:
        return 2
    return 2 + {126: 2, 127: 8}.get(start[1] & 0x7F, 0)


def _read_header(header: bytes) -> tuple[int, int]:
    """Opcode and length of a frame's payload."""
    first, second = header[:2]
    opcode, length = first & 0x0F, second & 0x7F
    if first & 0x70 or opcode not in _OPCODES:
        raise MalformedPacketError(f"websocket frame that begins with 0x{first:02x} (RFC 6455, section 5.2)")
    if second & _MASKED:
        raise MalformedPacketError("masked websocket frame (RFC 6455, section 5.1)")
    if opcode >= _CLOSE and (length > _MOST_CONTROL_BYTES or not first & _FINAL):
        raise MalformedPacketError("websocket control frame in pieces or too long (RFC 6455, section 5.5)")
    return opcode, int.from_bytes(header[2:]) if len(header) > 2 else length


def _frame(opcode: int, payload: bytes) -> bytes:
    """One whole frame, masked as a client's must be."""
    size = len(payload)
    head = bytes((_FINAL | opcode,))
    if size <= _MOST_CONTROL_BYTES:
        head += bytes((_MASKED | size,))
    elif size < 1 << 16:
        head += struct.pack("!BH", _MASKED | 126, size)
    else:
        head += struct.pack("!BQ", _MASKED | 127, size)
    key = os.urandom(4)
    # As two large numbers: byte by byte would cost more than all else that happens to a message.
    mask = int.from_bytes((key * (size // 4 + 1))[:size])
    return head + key + (int.from_bytes(payload) ^ mask).to_bytes(size)


# -- the handshake ----------------------------------------------------------------------------


def upgrade(
    sock: socket.socket,
    url: BrokerURL,
    headers: Mapping[str, str],
    limit: Limit,
) -> Websocket:
    """Do the websocket handshake on a connected, non-blocking socket.

    Args:
        headers: What the request says beside the headers of the standard, or in place of Host and Origin.

    Raises:
        ConnectError: The peer does not answer as a websocket of MQTT does; says what it answered.
        TLSAlertError: It ended the TLS connection instead.
        Interrupted: The attempt was called off.
    """
    key = base64.b64encode(os.urandom(16))
    try:
        exchange = Exchange(sock, limit)
        # What broke off the sending, an alert over our certificate for instance, is still to be read.
        with contextlib.suppress(OSError):
            exchange.send(_request(url, key, headers))
        head, rest = exchange.receive_head()
        if problem := _problem(head, key):
            raise ConnectError(f"no websocket at {url}: {problem}; check host, port and path of mqtt_url")
    except BaseException as error:
        sock.close()
        if is_alert(error):
            raise TLSAlertError(error) from error
        if isinstance(error, OSError):
            raise ConnectError(f"no websocket at {url}: {reason_of(error)}") from error
        raise
    return Websocket(sock, rest)


def _request(url: BrokerURL, key: bytes, extra: Mapping[str, str]) -> bytes:
    host = f"[{url.host}]" if ":" in url.host else url.host
    if url.port != (443 if url.tls else 80):
        host += f":{url.port}"
    headers = {
        "Host": host,
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Origin": f"{'https' if url.tls else 'http'}://{host}",
        "Sec-WebSocket-Key": key.decode(),
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Protocol": "mqtt",
    }
    given = {name.lower() for name in extra}
    headers = {name: value for name, value in headers.items() if name.lower() not in given} | dict(extra)
    lines = [f"GET {url.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def _problem(head: bytes, key: bytes) -> str | None:
    """What is wrong with the answer; None when it is right."""
    status, *lines = head.decode("latin-1").split("\r\n")
    code = status.split(" ")[1:2]
    if not status.startswith("HTTP/1.1 ") or code != ["101"]:
        return f"the peer answers {status[:100]!r}"
    headers = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    if (
        "websocket" not in headers.get("upgrade", "").lower()
        or "upgrade" not in headers.get("connection", "").lower()
    ):
        return "the peer does not upgrade the connection"
    expected = base64.b64encode(hashlib.sha1(key + _GUID).digest())  # noqa: S324 - as the standard has it
    if headers.get("sec-websocket-accept", "").encode() != expected:
        return "the peer's Sec-WebSocket-Accept is wrong"
    if headers.get("sec-websocket-protocol", "mqtt").lower() != "mqtt":
        return "the peer does not speak MQTT there [MQTT-6.0.0-4]"
    return None
