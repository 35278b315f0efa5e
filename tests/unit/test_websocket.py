"""Websockets: frames in any pieces, a peer that breaks the rules, and the handshake."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from tars_mqtt import ConnectError
from tars_mqtt._core.limit import Interrupted, Limit
from tars_mqtt._core.websocket import Websocket, upgrade
from tars_mqtt._core.wire import MalformedPacketError
from tars_mqtt.url import BrokerURL

URL = BrokerURL.parse("ws://localhost:9001/mqtt?token=secret")
GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
BINARY, CONTINUATION, TEXT, CLOSE, PING, PONG = 0x82, 0x80, 0x81, 0x88, 0x89, 0x8A


def frame(first: int, payload: bytes = b"") -> bytes:
    """A frame as a broker sends it: not masked."""
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", first, size) + payload
    if size < 65_536:
        return struct.pack("!BBH", first, 126, size) + payload
    return struct.pack("!BBQ", first, 127, size) + payload


def unframed(data: bytes) -> list[tuple[int, bytes]]:
    """First byte and payload of each frame of ours, which must be masked."""
    found = []
    while data:
        first, second = data[:2]
        assert second & 0x80, "a client's frames are masked"
        size, start = second & 0x7F, 2
        if size == 126:
            size, start = struct.unpack("!H", data[2:4])[0], 4
        elif size == 127:
            size, start = struct.unpack("!Q", data[2:10])[0], 10
        key, payload = data[start : start + 4], data[start + 4 : start + 4 + size]
        assert len(payload) == size, "a whole frame"
        found.append((first, bytes(byte ^ key[index % 4] for index, byte in enumerate(payload))))
        data = data[start + 4 + size :]
    return found


class FakeSocket:
    """Gives piece after piece, and takes as many bytes at a time as it is told to."""

    def __init__(self, *incoming: bytes, takes: list[int] | None = None) -> None:
        self.incoming = list(incoming)
        self.takes = takes
        self.sent = b""

    def recv(self, size: int) -> bytes:
        if not self.incoming:
            raise BlockingIOError
        piece = self.incoming.pop(0)
        if len(piece) > size:
            self.incoming.insert(0, piece[size:])
        return piece[:size]

    def send(self, data: bytes) -> int:
        if self.takes is None:
            taken = len(data)
        elif self.takes:
            taken = self.takes.pop(0)
        else:
            raise BlockingIOError
        self.sent += data[:taken]
        return min(taken, len(data))


def over(*incoming: bytes, takes: list[int] | None = None) -> tuple[Websocket, FakeSocket]:
    sock = FakeSocket(*incoming, takes=takes)
    return Websocket(sock), sock  # type: ignore[arg-type]


def everything(websocket: Websocket, sock: FakeSocket) -> bytes:
    received = b""
    while sock.incoming or websocket.pending():
        with contextlib.suppress(BlockingIOError):
            received += websocket.recv(65_536)
    return received


# -- in -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000, 100_000])
def test_however_the_bytes_are_cut_the_payload_is_the_same(size: int) -> None:
    """Frames of every length field, in pieces, with others between; packets need not keep to frames."""
    data = b"".join(
        (
            frame(BINARY, b"a" * 125),
            frame(BINARY, b""),
            frame(PING, b"are you there"),
            frame(0x02, b"b" * 126),  # in two pieces
            frame(PONG),
            frame(CONTINUATION, b"c" * 70_000),
            frame(BINARY, b"d"),
        )
    )
    websocket, sock = over(*(data[start : start + size] for start in range(0, len(data), size)))
    assert everything(websocket, sock) == b"a" * 125 + b"b" * 126 + b"c" * 70_000 + b"d"
    assert unframed(sock.sent) == [(PONG, b"are you there")]


def test_a_frame_is_handed_on_as_it_comes_whatever_length_it_claims() -> None:
    """Collected, a frame that never ends would fill the memory."""
    websocket, _ = over(struct.pack("!BBQ", BINARY, 127, 1 << 62) + b"x" * 10, b"y" * 20)
    assert websocket.recv(65_536) == b"x" * 10
    assert websocket.recv(65_536) == b"y" * 20


def test_what_came_behind_the_handshake_is_the_first_to_be_read() -> None:
    websocket = Websocket(FakeSocket(), unread=frame(BINARY, b"x"))  # type: ignore[arg-type]
    assert websocket.pending()
    assert websocket.recv(65_536) == b"x"
    assert not websocket.pending()


def test_half_a_header_is_nothing_to_be_busy_with() -> None:
    websocket, _ = over(frame(BINARY, b"x" * 200)[:3])
    with pytest.raises(BlockingIOError):
        websocket.recv(65_536)
    assert not websocket.pending()
    with pytest.raises(BlockingIOError):
        websocket.recv(65_536)


def test_a_close_is_answered_and_is_the_end_behind_what_came_before() -> None:
    websocket, sock = over(frame(BINARY, b"last") + frame(CLOSE, b"\x03\xe8bye") + frame(BINARY, b"more"))
    assert websocket.recv(65_536) == b"last"
    assert websocket.pending(), "the end is to be noticed, though the socket stays silent"
    assert websocket.recv(65_536) == b""
    assert unframed(sock.sent) == [(CLOSE, b"\x03\xe8")]


def test_the_end_of_the_stream_is_the_end() -> None:
    websocket, _ = over(frame(BINARY, b"cut")[:4], b"")
    assert websocket.recv(65_536) == b"cu"
    assert websocket.recv(65_536) == b""


@pytest.mark.parametrize(
    "wrong",
    [
        frame(TEXT, b"text"),
        frame(0x83, b"reserved"),
        frame(0xC2, b"compressed"),
        frame(0x09, b"a ping in pieces"),
        frame(PING, b"x" * 126),
        b"\x82\x85keyxmasked"[:11],
    ],
    ids=["text", "reserved opcode", "reserved bit", "control in pieces", "long control", "masked"],
)
def test_a_frame_that_may_not_be_is_malformed(wrong: bytes) -> None:
    websocket, _ = over(wrong)
    with pytest.raises(MalformedPacketError, match="RFC 6455"):
        websocket.recv(65_536)


def test_pings_without_end_take_neither_the_thread_nor_memory() -> None:
    """One look at the socket each time; of the answers only the last is kept while the socket is full."""
    websocket, sock = over(*(frame(PING, b"%5d" % number) for number in range(1000)), takes=[])
    for _ in range(1000):
        with pytest.raises(BlockingIOError):
            websocket.recv(65_536)
    sock.takes = None
    assert websocket.send(b"x") == 1
    assert unframed(sock.sent) == [(PONG, b"    0"), (BINARY, b"x"), (PONG, b"  999")]


# -- out ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 125, 126, 65_535, 65_536, 200_000])
def test_what_is_sent_arrives_masked_in_bounded_frames(size: int) -> None:
    data = bytes(index % 251 for index in range(size))
    websocket, sock = over()
    rest = memoryview(data)
    while rest:
        rest = rest[websocket.send(rest) :]
    frames = unframed(sock.sent)
    assert b"".join(payload for _, payload in frames) == data
    assert {first for first, _ in frames} == {BINARY}
    assert max(len(payload) for _, payload in frames) <= 65_536


def test_a_socket_that_takes_little_gets_each_frame_once_and_whole() -> None:
    """With a ping in the middle of a frame, whose answer comes behind it."""
    websocket, sock = over(frame(PING, b"?"), takes=[5])
    with pytest.raises(BlockingIOError):
        websocket.send(b"hello")
    with pytest.raises(BlockingIOError):
        websocket.recv(65_536)
    sock.takes = [1] * 100
    assert websocket.send(b"hello") == 5
    assert websocket.send(b"world") == 5
    with contextlib.suppress(BlockingIOError):
        websocket.recv(65_536)
    assert unframed(sock.sent) == [(BINARY, b"hello"), (PONG, b"?"), (BINARY, b"world")]


# -- the handshake ------------------------------------------------------------------------


class Server(threading.Thread):
    """Reads one request and gives one answer."""

    def __init__(self, peer: socket.socket, answer: str, pieces: int = 1_000_000) -> None:
        super().__init__()
        self.peer, self.answer, self.pieces = peer, answer, pieces
        self.request = ""
        self.start()

    def run(self) -> None:
        while "\r\n\r\n" not in self.request:
            self.request += self.peer.recv(4096).decode()
        key = self.headers()["Sec-WebSocket-Key"]
        accept = base64.b64encode(hashlib.sha1((key + GUID).encode()).digest()).decode()
        data = self.answer.replace("{accept}", accept).encode("latin-1")
        for start in range(0, len(data), self.pieces):
            self.peer.send(data[start : start + self.pieces])
        self.peer.shutdown(socket.SHUT_WR)

    def headers(self) -> dict[str, str]:
        lines = self.request.split("\r\n")[1:-2]
        return dict(line.split(": ", 1) for line in lines)


GOOD = (
    "HTTP/1.1 101 Switching Protocols\r\nupgrade: WebSocket\r\nConnection: keep-alive, Upgrade\r\n"
    "Sec-WebSocket-Accept: {accept}\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n"
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    with ours, peer:
        yield ours, peer


def handshake(
    pair: tuple[socket.socket, socket.socket], answer: str, **options: int
) -> tuple[Websocket, Server]:
    server = Server(pair[1], answer, **options)
    try:
        return upgrade(pair[0], URL, {}, Limit(time.monotonic() + 10, lambda: False)), server
    finally:
        server.join(10)


@pytest.mark.parametrize("pieces", [1, 7, 1000])
def test_the_handshake_asks_for_mqtt_and_loses_nothing_behind_the_answer(pair, pieces: int) -> None:
    websocket, server = handshake(pair, GOOD + "\x82\x02hi", pieces=pieces)
    received = b""
    while len(received) < 2:
        with contextlib.suppress(BlockingIOError):
            received += websocket.recv(65_536)
    assert received == b"hi"
    assert server.request.startswith("GET /mqtt?token=secret HTTP/1.1\r\nHost: localhost:9001\r\n")
    headers = server.headers()
    assert headers["Sec-WebSocket-Protocol"] == "mqtt"
    assert headers["Sec-WebSocket-Version"] == "13"
    assert len(base64.b64decode(headers["Sec-WebSocket-Key"])) == 16


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "the peer answers 'HTTP/1.1 404 Not Found'"),
        ("HTTP/1.0 101 Old\r\n\r\n", "the peer answers 'HTTP/1.0 101 Old'"),
        ("HTTP/1.1 500 \x1b[31m\u00e9\r\n\r\n", r"the peer answers 'HTTP/1.1 500 \\x1b"),
        ("HTTP/1.1 101 OK\r\n\r\n", "the peer does not upgrade the connection"),
        (GOOD.replace("{accept}", "bm9uc2Vuc2U="), "Sec-WebSocket-Accept is wrong"),
        (GOOD.replace("mqtt", "soap"), "does not speak MQTT there"),
        ("\x20\x02\x00\x00\r\n\r\n", "the peer answers"),
        ("x" * 20_000, "the peer answers"),
        ("HTTP/1.1 101", "the peer hung up in the middle of its answer"),
        ("", "the peer hung up"),
    ],
)
def test_an_answer_that_is_no_websocket_of_mqtt_is_quoted(pair, answer: str, said: str) -> None:
    """Shortened and escaped; the query, which may hold a token, is not shown."""
    with pytest.raises(ConnectError, match=said) as caught:
        handshake(pair, answer)
    text = str(caught.value)
    assert text.startswith("no websocket at ws://localhost:9001/mqtt?***: ")
    assert len(text) < 300
    assert pair[0].fileno() == -1, "closed"


def test_an_answer_that_does_not_come_is_waited_for_until_the_deadline(pair) -> None:
    with pytest.raises(ConnectError, match="no answer in time"):
        upgrade(pair[0], URL, {}, Limit(time.monotonic() + 0.1, lambda: False))


def test_the_handshake_can_be_called_off(pair) -> None:
    with pytest.raises(Interrupted):
        upgrade(pair[0], URL, {}, Limit(time.monotonic() + 60, lambda: True))
    assert pair[0].fileno() == -1


def test_an_ipv6_address_stands_in_brackets(pair) -> None:
    server = Server(pair[1], GOOD)
    upgrade(pair[0], BrokerURL.parse("ws://[::1]:80/"), {}, Limit(time.monotonic() + 10, lambda: False))
    server.join(10)
    assert server.headers()["Host"] == "[::1]"
