"""The far side of a measurement: a program in C, or where there is no compiler the same in Python."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

_SOURCE = Path(__file__).with_name("far.c")
_BATCH_BYTES = 65_536
_ID_DIGITS = 32


def build(directory: Path) -> list[str]:
    """Return the command that starts it."""
    compiler = shutil.which("cc")
    program = directory / "far"
    if compiler and subprocess.run([compiler, "-O2", "-o", program, _SOURCE], check=False).returncode == 0:
        return [str(program)]
    print("no C compiler that works: the far side runs in Python and may be the limit", file=sys.stderr)
    return [sys.executable, "-m", "bench.far"]


# -- what far.c does --------------------------------------------------------------------------


class Connection:
    def __init__(self, port: int, client_id: bytes) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._unread = b""
        head = b"\x00\x04MQTT\x04\x02\x00\x00"
        self.send(packet(0x10, head + len(client_id).to_bytes(2, "big") + client_id))
        self.count(0x20)

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def count(self, kind: int) -> int:
        """Wait for packets and return how many of this kind came."""
        return len(self.bodies(kind))

    def bodies(self, kind: int) -> list[bytes]:
        """Wait for packets of this kind and return what follows their headers; others pass by."""
        found: list[bytes] = []
        while not found:
            received = self._socket.recv(1 << 20)
            if not received:
                raise EOFError("the broker closed the connection")
            self._unread += received
            start, size = 0, len(self._unread)
            while True:
                position, length, shift = start + 1, 0, 0
                while position < size and self._unread[position] > 127:
                    length |= (self._unread[position] & 127) << shift
                    shift += 7
                    position += 1
                if position >= size:
                    break
                length |= self._unread[position] << shift
                end = position + 1 + length
                if end > size:
                    break
                if self._unread[start] & 0xF0 == kind:
                    found.append(self._unread[position + 1 : end])
                start = end
            self._unread = self._unread[start:]
        return found


def packet(first: int, body: bytes) -> bytes:
    length, header = len(body), bytearray([first])
    while length > 127:
        header.append(length & 127 | 128)
        length >>= 7
    header.append(length)
    return bytes(header) + body


def _subscribe(port: int, count: int) -> None:
    connection = Connection(port, b"far-subscriber")
    connection.send(packet(0x82, b"\x00\x01\x00\x07bench/#\x00"))
    connection.count(0x90)
    _say("ready")
    while count > 0:
        count -= connection.count(0x30)
    _say(f"{time.time():.9f}")


def _publish(port: int, count: int, qos: int, topics: int, window: int) -> None:
    payload = sys.stdin.buffer.readline().rstrip(b"\n")
    before, mark, after = payload.partition(b'"id":"')
    before, after = before + mark, after[_ID_DIGITS:]
    connection = Connection(port, b"far-publisher")
    _say("ready")
    if not sys.stdin.buffer.readline():
        return
    batch = bytearray()
    unacknowledged = 0
    for number in range(count):
        topic = b"bench/%05d/event" % (number % topics)
        packet_id = (number % 65_535 + 1).to_bytes(2, "big") if qos else b""
        envelope = b"%b%032x%b" % (before, number, after)
        batch += packet(0x30 | qos << 1, len(topic).to_bytes(2, "big") + topic + packet_id + envelope)
        unacknowledged += qos
        if len(batch) >= _BATCH_BYTES or unacknowledged == window:
            connection.send(bytes(batch))
            batch.clear()
        while unacknowledged == window:
            unacknowledged -= connection.count(0x40)
    connection.send(bytes(batch))
    while unacknowledged:
        unacknowledged -= connection.count(0x40)
    _say(f"{time.time():.9f}")
    connection.send(b"\xe0\x00")


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    mode, *numbers = sys.argv[1:]
    (_subscribe if mode == "subscribe" else _publish)(*map(int, numbers))
