"""The byte stream of one connection: whole packets in, whole packets out."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING, TypeGuard

from tars_mqtt._core import wire
from tars_mqtt._core.dial import reason_of
from tars_mqtt.topics import MAX_STRING_BYTES

if TYPE_CHECKING:
    import ssl  # not before it is needed: it takes a tenth of the import

_RECEIVE_BYTES = 65_536
"""Below the size at which malloc maps fresh pages for every read."""

_SMALL_BYTES = 1024
"""A read shorter than this is a few packets at rest, not a stream under way."""

_MOST_HEAD_BYTES = 2 + MAX_STRING_BYTES + 2
"""Of a PUBLISH: the longest topic with its length, and a packet id."""

_TCP_ESTABLISHED = 1

_SEND_BYTES = 262_144
"""Packets are joined into one ``send`` up to about this size."""


class ConnectionLostError(Exception):
    """The connection is gone; the message says how. Internal: never reaches a caller."""


class HungUpError(ConnectionLostError):
    """The peer closed the connection and did not say why."""


class SilenceError(ConnectionLostError):
    """The peer gave no sign of life; nobody closed anything."""


class TLSAlertError(ConnectionLostError):
    """The peer ended the connection by an alert. A broker that refuses our certificate says so only now."""

    def __init__(self, error: ssl.SSLError) -> None:
        super().__init__(f"the broker ended the TLS connection: {reason_of(error)}")
        self.error = error


def is_alert(error: BaseException) -> TypeGuard[ssl.SSLError]:
    """Whether the peer says that it does not want to go on."""
    return isinstance(error, OSError) and "ALERT" in (getattr(error, "reason", None) or "")


class _PassedOver:
    """A PUBLISH that is too large to be held, as it goes by: topic and packet id are all that stays."""

    def __init__(self, first: int, length: int) -> None:
        self._first = first
        self._head = b""
        self.left = length

    def take(self, data: bytes) -> bytes:
        """Let go of what belongs to it, and return what stands behind it."""
        own = data[: self.left]
        self.left -= len(own)
        self._head += own[: _MOST_HEAD_BYTES - len(self._head)]
        return data[len(own) :]

    @property
    def packet(self) -> tuple[int, bytes]:
        """What remains, under the name that `wire` has for it."""
        topic_bytes = int.from_bytes(self._head[:2])
        return wire.PASSED_OVER | self._first & 0x0F, self._head[: 2 + topic_bytes + 2]


class Stream:
    """Buffers a non-blocking socket, so that packets cost no system call each.

    Owned by the network thread; a publisher may `send_now` while that sleeps.
    """

    def __init__(self, sock: socket.socket, packet_limit: int, v5: bool) -> None:
        self._socket = sock
        self._packet_limit = packet_limit
        self._v5 = v5
        self._unsplit = False
        self._passed_over: _PassedOver | None = None
        self._acknowledge_quickly = _is_tcp(sock) and hasattr(socket, "TCP_QUICKACK")
        self._pieces: list[bytes] = []
        self._piece_bytes = 0
        self._needed = 0
        self.bytes_in = 0
        # Guarded by _writing:
        self._writing = threading.Lock()
        self.sends_now = type(sock) is socket.socket
        """Whether others may `send_now`. Not over TLS and websockets, which have a state of their own."""
        self.cut_short = 0
        """Messages sent by `send_now` of which something is still to leave: one at most."""
        self._outgoing: deque[bytes] = deque()
        self._unsent = memoryview(b"")
        self._full = False
        self.outgoing_bytes = 0
        self.drained_bytes = 0
        """What the socket took after it had been full: the peer reads, if slowly."""
        self.bytes_out = 0

    def fileno(self) -> int:
        """The socket's file descriptor."""
        return self._socket.fileno()

    # -- in -------------------------------------------------------------------------------

    def receive(self) -> list[tuple[int, bytes]]:
        """Read what is there and return the packets that are complete, as first byte and body.

        Of a PUBLISH above the packet limit only the head comes, as a `wire.PASSED_OVER`.

        Raises:
            ConnectionLostError: The peer closed, or the socket failed.
            MalformedPacketError: What arrived is not MQTT.
        """
        if self._unsplit:
            self._unsplit = False
            data = b"".join(self._pieces)
            self._pieces.clear()
            return self._split(data)
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError as error:
            if is_alert(error):
                raise TLSAlertError(error) from error
            raise ConnectionLostError(f"reading failed: {reason_of(error)}") from error
        if not data:
            raise HungUpError("the broker closed the connection")
        self.bytes_in += len(data)
        if self._acknowledge_quickly and len(data) < _SMALL_BYTES:
            # mosquitto leaves Nagle's algorithm on: what it writes behind a small packet, a PUBACK behind a
            # PUBLISH for instance, would wait for our delayed acknowledgement, 40 ms. Linux forgets the
            # option now and then, so it is set anew.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        if self._passed_over is not None:
            return self._pass_over(self._passed_over, data)
        if self._pieces:
            # A packet of many reads is joined once, when it is complete, not at every read.
            self._pieces.append(data)
            self._piece_bytes += len(data)
            if self._piece_bytes < self._needed:
                return []
            data = b"".join(self._pieces)
            self._pieces.clear()
        return self._split(data)

    def _split(self, data: bytes) -> list[tuple[int, bytes]]:
        try:
            packets, consumed, self._needed = wire.split_packets(data, self._packet_limit, self._v5)
        except wire.PacketTooLargeError:
            if data[0] & 0xF0 != wire.PUBLISH:
                raise
            length, start = wire.decode_varint(data, 1)
            self._passed_over = _PassedOver(data[0], length)
            return self._pass_over(self._passed_over, data[start:])
        if consumed < len(data):
            # What is malformed or too large behind whole packets is seen to when those are dealt with.
            self._keep(data[consumed:] if consumed else data, unsplit=self._needed == 0)
        return [(first, data[start:end]) for first, start, end in packets]

    def _pass_over(self, packet: _PassedOver, data: bytes) -> list[tuple[int, bytes]]:
        rest = packet.take(data)
        if packet.left:
            return []
        self._passed_over = None
        if rest:
            self._keep(rest, unsplit=True)
        return [packet.packet]

    def _keep(self, rest: bytes, unsplit: bool) -> None:
        self._pieces.append(rest)
        self._piece_bytes = len(rest)
        self._unsplit = unsplit

    def has_more(self) -> bool:
        """Whether there is something to `receive` that no selector sees: here, or inside the TLS layer."""
        pending = getattr(self._socket, "pending", None)
        return self._unsplit or (pending is not None and pending() > 0)

    @property
    def peer_closed(self) -> bool:
        """Whether the peer has closed, though what came before is not read. Known of TCP on Linux; else False."""
        if not self._acknowledge_quickly or not hasattr(socket, "TCP_INFO"):
            return False
        return self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _TCP_ESTABLISHED

    # -- out ------------------------------------------------------------------------------

    def write(self, packet: bytes) -> None:
        """Take one whole packet; it leaves with the next `flush`."""
        with self._writing:
            self._outgoing.append(packet)
            self.outgoing_bytes += len(packet)

    def write_all(self, packets: list[bytes]) -> None:
        """Take whole packets."""
        if packets:
            with self._writing:
                self._outgoing += packets
                self.outgoing_bytes += sum(map(len, packets))

    def send_no_more(self) -> None:
        """From now on the network thread alone sends: nothing may follow a DISCONNECT [MQTT-3.14.4-2]."""
        with self._writing:
            self.sends_now = False

    def send_now(self, packet: bytes) -> bool:
        """Send a whole packet without waiting; False when others wait, or the socket does not take it now.

        Any thread. What the socket leaves of it goes with the next `flush`.
        """
        sent: list[int] = []
        with self._writing:
            if not self.sends_now or self.outgoing_bytes:
                return False
            try:
                # In one step: an interrupt comes before it or after it, when it is known how much went.
                sent.extend(map(self._socket.send, (packet,)))
            except OSError:
                return False  # the network thread will find out why
            finally:
                if sent:
                    self.bytes_out += sent[0]
                    if sent[0] < len(packet):
                        self._unsent = memoryview(packet)[sent[0] :]
                        self.outgoing_bytes = len(self._unsent)
                        self.cut_short = 1
        return True

    @property
    def outgoing_packets(self) -> int:
        """How many packets wait for the next `flush`."""
        return len(self._outgoing)

    def flush(self) -> bool:
        """Send what the socket takes; True when nothing is left.

        Raises:
            ConnectionLostError: The socket failed.
        """
        with self._writing:
            while self.outgoing_bytes:
                if not self._unsent:
                    self.cut_short = 0
                    self._unsent = memoryview(self._join())
                try:
                    sent = self._socket.send(self._unsent)
                except (BlockingIOError, InterruptedError):
                    self._full = True
                    return False
                except OSError as error:
                    raise ConnectionLostError(f"writing failed: {reason_of(error)}") from error
                self._unsent = self._unsent[sent:]
                self.outgoing_bytes -= sent
                self.bytes_out += sent
                if self._full:
                    self.drained_bytes += sent
            self._full = False
            self.cut_short = 0
            return True

    def _join(self) -> bytes:
        outgoing = self._outgoing
        if len(outgoing) == 1:
            return outgoing.popleft()
        if self.outgoing_bytes <= _SEND_BYTES:
            joined = b"".join(outgoing)
            outgoing.clear()
            return joined
        batch = [outgoing.popleft()]
        size = len(batch[0])
        while outgoing and size + len(outgoing[0]) <= _SEND_BYTES:
            packet = outgoing.popleft()
            size += len(packet)
            batch.append(packet)
        return b"".join(batch)

    def finish(self) -> None:
        """Tell the peer that no more comes; what it sends can still be read. Nothing where TLS is in between."""
        if type(self._socket) is socket.socket:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)

    @property
    def undelivered_bytes(self) -> int:
        """What the system still holds for the peer. Known on Linux; else 0."""
        if sys.platform != "linux":
            return 0
        import fcntl  # neither is there on Windows
        import termios

        try:
            answer = fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, bytes(4))
        except OSError:
            return 0
        return int.from_bytes(answer, sys.byteorder)

    def close(self) -> None:
        """Close the socket. Idempotent."""
        with self._writing:  # or a publisher might send on what has got the descriptor next
            self.sends_now = False
            self._socket.close()

    def release_descriptor(self) -> None:
        """In a forked child, where the lock may never come free: close this process's end."""
        self._socket.close()


def _is_tcp(sock: socket.socket) -> bool:
    return getattr(sock, "family", None) in (socket.AF_INET, socket.AF_INET6)
