"""One connection after the other: the socket, what to wait for, and waking who waits."""

from __future__ import annotations

import contextlib
import math
import selectors
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from tars_mqtt._core import wire
from tars_mqtt._core.density import Density
from tars_mqtt._core.event import (
    PAHO_PACKETS,
    ConnectRequest,
    Event,
    Packets,
)
from tars_mqtt._core.stream import (
    ConnectionLostError,
    Stream,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tars_mqtt._core.paho import Control

_LAST_WORDS_TIME = 1.0
"""Seconds for which a broker may neither take nor send anything on a connection that was left, before it closes it."""

_LOOK = 0.1
"""Seconds between two looks at what nobody tells."""

_DIALOGUE_GAP = 0.00005
"""Seconds between two messages that do not come one right after the other."""


class Transport:
    """One connection after the other. Owned by the network thread but for what says that any thread may call it.

    Holds no descriptor before `start` and after `close`; may be started again.
    """

    _selector: selectors.BaseSelector
    _waker: socket.socket
    _alarm: socket.socket

    def __init__(self, client_id: str, version: int, clean: bool) -> None:
        self._client_id = client_id
        self._clean = clean
        # Any thread:
        self._control = self._new_control(version)
        self.closed = True
        self._signalled = False
        self._sleeping = False
        self._lent = 0.0
        # Owned by the network thread:
        self._stream: Stream | None = None
        self._events: deque[Event] = deque()
        self._interest = 0
        self._paused = False
        self._density = Density()
        self._failure: ConnectionLostError | None = None

    # -- any thread -----------------------------------------------------------------------

    @property
    def client(self) -> Any:
        """paho's client; another object with another version of MQTT."""
        return self._control.client

    def wake(self) -> None:
        """Let the network thread look at its queues. Costs a system call only while it sleeps."""
        self._signalled = True
        if self._sleeping:
            self._sleeping = False
            try:  # noqa: SIM105 - at once: Ctrl-C in between would leave the thread asleep
                self._alarm.send(b"\0")
            except OSError:
                pass

    def idle_stream(self) -> Stream | None:
        """The connection, if the network thread sleeps, has nothing to do, and nobody has asked just now.

        Then a publisher may `send_now`, which takes one system call instead of two threads' waking; who publishes
        one message after the other is better off when they gather.
        """
        stream = self._stream
        if (
            not self._sleeping
            or self._signalled
            or stream is None
            or not stream.sends_now
            or stream.outgoing_bytes
        ):
            return None
        now = time.monotonic()
        if now - self._lent < _DIALOGUE_GAP:
            return None
        self._lent = now
        return stream

    def start(self) -> None:
        """Get ready for the network thread, before it starts."""
        if self.closed:
            self._waker, self._alarm = socket.socketpair()
            try:
                self._selector = selectors.DefaultSelector()
            except OSError:
                self._waker.close()
                self._alarm.close()
                raise
            self._waker.setblocking(False)
            self._alarm.setblocking(False)
            self._selector.register(self._waker, selectors.EVENT_READ)
            self.closed = False

    def release_descriptors(self) -> None:
        """In a forked child: let go of the parent's connection without a word on it."""
        if self.closed:
            return
        if self._stream is not None:
            self._stream.release_descriptor()
        self._selector.close()
        self._waker.close()
        self._alarm.close()

    # -- network thread ---------------------------------------------------------------------

    def acknowledge_wake(self) -> None:
        """Call before looking at the queues: a `wake` from now on shortens the next sleep."""
        self._signalled = False

    def sleep(self, seconds: float) -> None:
        """Wait without a connection; `wake` ends it early."""
        self._select(seconds)

    def open(self, sock: Any, request: ConnectRequest) -> None:
        """Take over a connected socket and write CONNECT; the `Connack` comes out of `poll`."""
        self._stream = Stream(sock, request.packet_limit, request.version == 5)
        self._interest = 0
        self._paused = False
        if request.version != self._control.version:
            self._control = self._new_control(request.version)
        self._control.open(self._stream, request)

    def poll(self, timeout: float, more: bool, patience: float = math.inf) -> list[Event]:
        """Write what is due, wait for at most *timeout* seconds, and return what happened, in order.

        Args:
            timeout: Seconds.
            more: The caller has more to write, as soon as what it wrote is on its way.
            patience: Seconds; what is to be read is not left to gather for longer.

        Raises:
            ConnectionLostError: The connection is gone. What had arrived before comes first, by an
                earlier return.
        """
        stream = self._stream
        if stream is None:
            raise ConnectionLostError("there is no connection")
        if self._failure is not None:
            raise self._failure
        self._control.write()
        self._density.note(stream.outgoing_packets)
        try:
            flushed = stream.flush()
        except ConnectionLostError:
            # What the broker said last, an alert or a DISCONNECT, tells more than that writing failed.
            self._read(stream)
            if not self._events:
                raise
            return self._take_events()
        if flushed and not more and patience:
            pause = self._density.pause(time.monotonic())
            if pause:
                time.sleep(min(pause, patience))
        self._watch(
            stream, (0 if self._paused else selectors.EVENT_READ) | (0 if flushed else selectors.EVENT_WRITE)
        )
        unread = not self._paused and stream.has_more()
        if self._select(0.0 if unread or (more and flushed) else timeout) or unread:
            self._read(stream)
        return self._take_events()

    def _take_events(self) -> list[Event]:
        events = list(self._events)
        self._events.clear()
        return events

    def write(self, packet: bytes) -> None:
        """Queue one whole packet; the next `poll` sends it."""
        if self._stream is not None:
            self._stream.write(packet)

    def write_all(self, packets: list[bytes]) -> None:
        """Queue whole packets; the next `poll` sends them."""
        if self._stream is not None:
            self._stream.write_all(packets)

    @property
    def unsent_bytes(self) -> int:
        """Bytes that the socket has not taken yet."""
        return self._stream.outgoing_bytes if self._stream else 0

    @property
    def unsent_packets(self) -> int:
        """Packets that the socket has not taken yet."""
        return self._stream.outgoing_packets if self._stream else 0

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes read and written on this connection."""
        return (self._stream.bytes_in, self._stream.bytes_out) if self._stream else (0, 0)

    @property
    def signs_of_life(self) -> int:
        """A count that grows when the peer writes, and when it reads what it was behind with."""
        return self._stream.bytes_in + self._stream.drained_bytes if self._stream else 0

    def pause(self, paused: bool) -> None:
        """Stop or resume reading: the peer's window fills and holds it back."""
        self._paused = paused

    @property
    def peer_closed(self) -> bool:
        """Whether the peer has closed the connection, though what came before is not read."""
        return self._stream is not None and self._stream.peer_closed

    def hand_to_paho(self, first: int, body: bytes) -> None:
        """Let paho deal with a message-flow packet that belongs to a direct use of its client."""
        self._events += self._control.read(first, body)

    def offer_to_paho(self, first: int, body: bytes) -> bool:
        """Let a direct user of paho have a PUBLISH that no subscription of ours takes."""
        if not self._control.wants_messages:
            return False
        self.hand_to_paho(first, body)
        return True

    def subscribe(self, topic_filter: str, qos: int, identifier: int | None) -> int:
        """Write SUBSCRIBE for one filter and return its packet id."""
        return self._control.subscribe(topic_filter, qos, identifier)

    def unsubscribe(self, topic_filter: str) -> int:
        """Write UNSUBSCRIBE for one filter and return its packet id."""
        return self._control.unsubscribe(topic_filter)

    def flush(self, time_left: Callable[[], float]) -> bool:
        """Send all that waits; True when it left in time.

        Args:
            time_left: Seconds; asked again and again.
        """
        stream = self._stream
        if stream is None:
            return False
        with contextlib.suppress(ConnectionLostError):
            while not stream.flush():
                remaining = time_left()
                if remaining <= 0:
                    return False
                self._watch(stream, selectors.EVENT_WRITE)
                self.acknowledge_wake()  # or each look would be over at once
                self._select(min(remaining, _LOOK))
            return True
        return False

    def disconnect(self, time_left: Callable[[], float], owed: bool) -> bool:
        """Write DISCONNECT behind all that waits; True when everything left in time.

        Args:
            time_left: See `flush`.
            owed: Whether the broker may still send something, beside the answers to what paho has written.
        """
        if self._stream is None:
            return False
        self._stream.send_no_more()
        with contextlib.suppress(ConnectionLostError):
            self._control.disconnect()  # behind what paho still had to write
            if self.flush(time_left):
                if owed or self._control.has_asked:
                    self._read_to_the_end(time_left)
                return True
        return False

    def _read_to_the_end(self, time_left: Callable[[], float]) -> None:
        """Wait until the broker has closed the connection, too.

        A socket that is closed while something still comes is reset, and with it goes what the broker has not read:
        acknowledgements, and the DISCONNECT itself. Where nothing comes, the system delivers all by itself.
        """
        stream = self._stream
        assert stream is not None
        stream.finish()
        undelivered = stream.undelivered_bytes
        active = time.monotonic()
        with contextlib.suppress(ConnectionLostError, wire.MalformedPacketError):
            while (left := min(time_left(), active + _LAST_WORDS_TIME - time.monotonic())) > 0:
                self._watch(stream, selectors.EVENT_READ)
                self.acknowledge_wake()
                comes = self._select(min(left, _LOOK))
                if comes:
                    stream.receive()
                before, undelivered = undelivered, stream.undelivered_bytes
                if comes or undelivered < before:
                    active = time.monotonic()

    def drop(self) -> int:
        """Close the connection without a word; returns `Stream.cut_short`. Idempotent."""
        stream, self._stream = self._stream, None
        self._events.clear()
        self._failure = None
        if stream is None:
            return 0
        self._watch(stream, 0)
        self._control.drop()
        stream.close()
        return stream.cut_short

    def close(self) -> None:
        """Release everything. The last act of the network thread."""
        self.drop()
        self.closed = True
        self._selector.close()
        self._waker.close()
        self._alarm.close()

    # -- inside -----------------------------------------------------------------------------

    def _watch(self, stream: Stream, interest: int) -> None:
        if interest == self._interest:
            return
        if not interest:
            self._selector.unregister(stream)
        elif not self._interest:
            self._selector.register(stream, interest)
        else:
            self._selector.modify(stream, interest)
        self._interest = interest

    def _select(self, timeout: float) -> bool:
        """Wait; True when the connection may be read."""
        self._sleeping = True
        # A wake between the look at the queues and this line must not be slept through.
        ready = self._selector.select(0.0 if self._signalled else max(timeout, 0.0))
        self._sleeping = False
        readable = False
        for key, mask in ready:
            if key.fileobj is self._waker:
                with contextlib.suppress(BlockingIOError):
                    self._waker.recv(4096)
            elif mask & selectors.EVENT_READ:
                readable = True
        return readable

    def _read(self, stream: Stream) -> None:
        try:
            received = stream.receive()
        except wire.MalformedPacketError as error:
            raise ConnectionLostError(f"the broker sent a malformed packet: {error}") from error
        self._density.note(len(received))
        if PAHO_PACKETS.isdisjoint([first & 0xF0 for first, _ in received]):
            if received:
                self._events.append(Packets(received))
            return
        flow: list[tuple[int, bytes]] = []
        for first, body in received:
            if first & 0xF0 in PAHO_PACKETS:
                if flow:
                    self._events.append(Packets(flow))
                    flow = []
                try:
                    self._events += self._control.read(first, body)
                except ConnectionLostError as error:
                    if not self._events:
                        raise
                    # The good packets before it come first.
                    self._failure = error
                    return
            else:
                flow.append((first, body))
        if flow:
            self._events.append(Packets(flow))

    def _new_control(self, version: int) -> Control:
        from tars_mqtt._core.paho import Control  # late: it takes as long to import as all of ours

        return Control(self._client_id, version, self._clean, self.wake)
