"""The connection to the broker. The only module that knows paho-mqtt.

paho speaks CONNECT, SUBSCRIBE, UNSUBSCRIBE and DISCONNECT with their answers, through its documented
functions for a foreign loop (``loop_read``, ``loop_write``). What it believes to be its socket is
a `_ControlPort`: it sees the control packets only. The packets of the message flow (PUBLISH, its
acknowledgements, PINGREQ) go past it, see `tars_mqtt._core.wire`.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from tars_mqtt._core import wire
from tars_mqtt._core.density import Density
from tars_mqtt._core.dial import Interrupted
from tars_mqtt._core.stream import (
    ConnectionLostError,
    HungUpError,
    SilenceError,
    Stream,
    TLSAlertError,
)
from tars_mqtt._core.websocket import upgrade
from tars_mqtt.errors import ConnectError
from tars_mqtt.url import BrokerURL

__all__ = [
    "LAST_PAHO_PACKET_ID",
    "Connack",
    "ConnectRequest",
    "ConnectionLostError",
    "Goodbye",
    "HungUpError",
    "Interrupted",
    "Packets",
    "SilenceError",
    "Suback",
    "TLSAlertError",
    "Transport",
    "Unsuback",
    "Will",
]

LAST_PAHO_PACKET_ID = 16_383
"""paho numbers its SUBSCRIBEs from 1 to here, we number PUBLISHes from above: no id is used twice
at a time [MQTT-2.2.1-3]."""

_CONTROL = frozenset((0x20, 0x90, 0xB0, 0xE0, 0xF0))
"""CONNACK, SUBACK, UNSUBACK, DISCONNECT and AUTH are paho's."""

_MOST_CONTROL_BYTES = 262_144
"""Of one of these: paho makes objects of all their properties, on the network thread."""


# -- what is asked and what is told -----------------------------------------------------------


@attrs.frozen
class Will:
    """The message that the broker publishes when the connection breaks."""

    topic: str
    payload: bytes
    qos: int
    retain: bool


@attrs.frozen(kw_only=True)
class ConnectRequest:
    """All that one connection attempt needs. Version is 5 or 4, the latter being MQTT 3.1.1."""

    url: BrokerURL
    version: int
    client_id: str
    username: str | None
    password: str | None = attrs.field(repr=False)
    keepalive: int
    session_expiry: int
    receive_maximum: int
    packet_limit: int
    will: Will | None
    deadline: float
    dial: Callable[[], socket.socket]
    """Connects a socket with the broker, or with a proxy that passes on to it."""
    headers: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    """Of a websocket's handshake, beside those of the standard."""
    secure: Callable[[socket.socket], socket.socket] | None = None
    """Does the TLS handshake on a connected socket; None where there is none to do."""


@attrs.frozen(kw_only=True)
class Connack:
    """The broker's answer to CONNECT. Limits are the standard's defaults where it set none."""

    code: int
    reason: str
    session_present: bool
    receive_maximum: int = 65_535
    maximum_packet_size: int | None = None
    maximum_qos: int = 2
    retain_available: bool = True
    subscription_identifiers: bool = False
    keepalive: int | None = None


@attrs.frozen
class Suback:
    """The answer to one SUBSCRIBE."""

    packet_id: int
    codes: tuple[int, ...]


@attrs.frozen
class Unsuback:
    """The answer to one UNSUBSCRIBE."""

    packet_id: int


@attrs.frozen
class Goodbye:
    """The broker ends the connection and says why (MQTT 5)."""

    code: int
    reason: str


@attrs.frozen
class Packets:
    """A run of message-flow packets, each its first byte and its body."""

    packets: list[tuple[int, bytes]]


Event = Connack | Suback | Unsuback | Goodbye | Packets


# -- paho's side ------------------------------------------------------------------------------


class _ControlPort:
    """What paho holds in place of a socket."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._unread = b""
        self.closed = False

    def feed(self, packet: bytes) -> None:
        """Let paho read one control packet."""
        self._unread += packet

    def recv(self, size: int) -> bytes:
        if not self._unread:
            raise BlockingIOError
        data, self._unread = self._unread[:size], self._unread[size:]
        return data

    def send(self, data: bytes | bytearray) -> int:
        self._stream.write(bytes(data))
        return len(data)

    def close(self) -> None:
        # The stream outlives this: a DISCONNECT that paho "sent" is still to be flushed.
        self.closed = True

    def fileno(self) -> int:
        return self._stream.fileno()

    def setblocking(self, flag: bool) -> None:
        pass


class _Paho(mqtt.Client):
    """paho's client on our stream. Overrides the two private hooks that it has no option for."""

    next_socket: _ControlPort | None = None
    wants_messages = False
    """Whether somebody asked paho itself for messages, through the client's ``.client``."""

    def message_callback_add(self, sub: str, callback: Any) -> None:
        self.wants_messages = True
        super().message_callback_add(sub, callback)

    def _create_socket(self) -> Any:
        port, self.next_socket = self.next_socket, None
        if port is None:
            raise ConnectError("connect through the MQTTClient, not through its .client")
        return port

    def _mid_generate(self) -> int:
        with self._mid_generate_mutex:
            self._last_mid = self._last_mid % LAST_PAHO_PACKET_ID + 1
            return self._last_mid


# -- the transport ----------------------------------------------------------------------------


class Transport:
    """One connection after the other. Owned by the network thread but for `wake` and `client`.

    Holds no descriptor before `start` and after `close`; may be started again.
    """

    _selector: selectors.BaseSelector
    _waker: socket.socket
    _alarm: socket.socket

    def __init__(self, client_id: str, version: int, clean: bool) -> None:
        self._client_id = client_id
        self._clean = clean
        # Any thread:
        self.client = self._new_client(version)
        self.closed = True
        self._signalled = False
        self._sleeping = False
        # Owned by the network thread:
        self._version = version
        self._stream: Stream | None = None
        self._port: _ControlPort | None = None
        self._events: deque[Event] = deque()
        self._interest = 0
        self._connack_body = b""
        self._paused = False
        self._density = Density()
        self._failure: ConnectionLostError | None = None

    # -- any thread -----------------------------------------------------------------------

    def wake(self) -> None:
        """Let the network thread look at its queues. Costs a system call only while it sleeps."""
        self._signalled = True
        if self._sleeping:
            self._sleeping = False
            with contextlib.suppress(OSError):
                self._alarm.send(b"\0")

    def start(self) -> None:
        """Get ready for the network thread, before it starts."""
        if self.closed:
            self._selector = selectors.DefaultSelector()
            self._waker, self._alarm = socket.socketpair()
            self._waker.setblocking(False)
            self._alarm.setblocking(False)
            self._selector.register(self._waker, selectors.EVENT_READ)
            self.closed = False

    def release_descriptors(self) -> None:
        """In a forked child: let go of the parent's connection without a word on it."""
        if self.closed:
            return
        if self._stream is not None:
            self._stream.close()
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

    def open(self, request: ConnectRequest, interrupted: Callable[[], bool]) -> None:
        """Connect a socket and write CONNECT; the `Connack` comes out of `poll`.

        Raises:
            ConnectError: Nobody answered.
            TLSAlertError: The peer ended the TLS connection before a websocket came about.
            Interrupted: The attempt was called off.
        """
        sock: Any = request.dial()
        if request.secure is not None:
            sock = request.secure(sock)
        if request.url.transport == "websockets":
            sock = upgrade(sock, request.url, request.headers, request.deadline, interrupted)
        self._stream = Stream(sock, request.packet_limit, request.version == mqtt.MQTTv5)
        self._port = _ControlPort(self._stream)
        self._interest = 0
        self._paused = False
        if request.version != self._version:
            self._version = request.version
            self.client = self._new_client(request.version)
        client = self.client
        client.next_socket = self._port
        # paho leaves out a password without a user name.
        nameless = request.username is None and request.password is not None
        client.username_pw_set("" if nameless else request.username, request.password)
        client.will_clear()
        if request.will is not None:
            will = request.will
            client.will_set(will.topic, will.payload, will.qos, will.retain)
        address = request.url.host or "localhost", request.url.port or 1
        if request.version == mqtt.MQTTv5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.ReceiveMaximum = request.receive_maximum
            if request.packet_limit < wire.MAX_PACKET_BYTES:
                properties.MaximumPacketSize = request.packet_limit
            if request.session_expiry:
                properties.SessionExpiryInterval = request.session_expiry
            client.connect_async(
                *address, request.keepalive, clean_start=not request.session_expiry, properties=properties
            )
        else:
            client.connect_async(*address, request.keepalive)
        client.reconnect()

    def poll(self, timeout: float, more: bool) -> list[Event]:
        """Write what is due, wait for at most *timeout* seconds, and return what happened, in order.

        Args:
            timeout: Seconds.
            more: The caller has more to write, as soon as what it wrote is on its way.

        Raises:
            ConnectionLostError: The connection is gone. What had arrived before comes first, by an
                earlier return.
        """
        stream = self._stream
        if stream is None:
            raise ConnectionLostError("there is no connection")
        if self._failure is not None:
            raise self._failure
        if self.client.want_write():
            self.client.loop_write()
        self._density.note(stream.outgoing_packets)
        try:
            flushed = stream.flush()
        except ConnectionLostError:
            # What the broker said last, an alert or a DISCONNECT, tells more than that writing failed.
            self._read(stream)
            if not self._events:
                raise
            return self._take_events()
        if flushed and not more and (pause := self._density.pause(time.monotonic())):
            time.sleep(pause)
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

    def hand_to_paho(self, first: int, body: bytes) -> None:
        """Let paho deal with a message-flow packet that belongs to a direct use of its client."""
        self._control(first, body)

    @property
    def paho_wants_messages(self) -> bool:
        """Whether a message that no subscription of ours matches has a taker in paho."""
        return self.client.wants_messages or self.client.on_message is not None

    def subscribe(self, topic_filter: str, qos: int, identifier: int | None) -> int:
        """Write SUBSCRIBE for one filter and return its packet id."""
        if self._version == mqtt.MQTTv5:
            properties = None
            if identifier is not None:
                properties = Properties(PacketTypes.SUBSCRIBE)  # type: ignore[no-untyped-call]
                properties.SubscriptionIdentifier = identifier
            _, packet_id = self.client.subscribe(
                topic_filter, options=SubscribeOptions(qos=qos), properties=properties
            )
        else:
            _, packet_id = self.client.subscribe(topic_filter, qos)
        return self._written(packet_id)

    def unsubscribe(self, topic_filter: str) -> int:
        """Write UNSUBSCRIBE for one filter and return its packet id."""
        _, packet_id = self.client.unsubscribe(topic_filter)
        return self._written(packet_id)

    def _written(self, packet_id: int | None) -> int:
        if packet_id is None:
            raise ConnectionLostError("there is no connection")
        # Now, not at the next poll: what is published after a subscribe must come behind it.
        self.client.loop_write()
        return packet_id

    def disconnect(self, deadline: float) -> bool:
        """Write DISCONNECT behind all that waits; True when everything left before the deadline."""
        stream = self._stream
        if stream is None:
            return False
        with contextlib.suppress(ConnectionLostError):
            self.client.disconnect()
            self.client.loop_write()
            while not stream.flush():
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return False
                self._watch(stream, selectors.EVENT_WRITE)
                self._select(min(remaining, 0.1))
            return True
        return False

    def drop(self) -> None:
        """Close the connection without a word. Idempotent."""
        stream, self._stream, self._port = self._stream, None, None
        self._events.clear()
        self._failure = None
        if stream is None:
            return
        self._watch(stream, 0)
        # paho forgets its port; with a new one at hand it would think itself connected.
        self.client.disconnect()
        self.client.loop_write()
        stream.close()

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
        flow: list[tuple[int, bytes]] = []
        for first, body in received:
            if first & 0xF0 in _CONTROL:
                if flow:
                    self._events.append(Packets(flow))
                    flow = []
                try:
                    self._control(first, body)
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

    def _control(self, first: int, body: bytes) -> None:
        """Let paho read one packet; its callbacks append to the events."""
        port = self._port
        if port is None:
            raise ConnectionLostError("there is no connection")
        if len(body) > _MOST_CONTROL_BYTES and first & 0xF0 in _CONTROL:
            raise ConnectionLostError(f"the broker sent a packet of type {first >> 4} that is too large")
        if first == 0x20:
            self._connack_body = body
        known = len(self._events)
        port.feed(bytes((first,)) + wire.encode_varint(len(body)) + body)
        try:
            code = self.client.loop_read()
        except Exception as error:
            raise ConnectionLostError(f"the broker sent a malformed packet: {error}") from error
        if first == 0x20 and len(self._events) == known and len(body) == 2:
            # paho reports neither a refused protocol version of MQTT 3.1.1 nor a CONNACK in the
            # old form that answers a CONNECT of MQTT 5: both mean that the version is not spoken.
            self._events.append(Connack(code=1, reason="unsupported protocol version", session_present=False))
        elif first == 0x20 and len(self._events) == known and len(body) > 2 and body[1] >= 0x80:
            # Nor a refusal for a reason that it does not expect here.
            reason = wire.reason_name(wire.CONNACK, body[1]).lower()
            self._events.append(Connack(code=body[1], reason=reason, session_present=False))
        elif code != mqtt.MQTT_ERR_SUCCESS and len(self._events) == known:
            raise ConnectionLostError(f"the broker sent a malformed packet (type {first >> 4})")

    def _new_client(self, version: int) -> _Paho:
        options: dict[str, Any] = {} if version == mqtt.MQTTv5 else {"clean_session": self._clean}
        client = _Paho(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            protocol=MQTTProtocolVersion(version),
            reconnect_on_failure=False,
            **options,
        )
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_unsubscribe = self._on_unsubscribe
        client.on_disconnect = self._on_disconnect
        # Its presence keeps paho from writing on whichever thread calls it.
        client.on_socket_register_write = lambda *_: self.wake()
        return client

    # paho's callbacks: they only enqueue, and never raise.

    def _on_connect(self, _client: Any, _data: Any, flags: Any, reason: ReasonCode, properties: Any) -> None:
        v5 = self._version == mqtt.MQTTv5
        code = reason.value if v5 else self._connack_body[1]
        self._events.append(
            Connack(
                code=code,
                reason=str(reason).lower(),
                session_present=flags.session_present,
                receive_maximum=getattr(properties, "ReceiveMaximum", 65_535),
                maximum_packet_size=getattr(properties, "MaximumPacketSize", None),
                maximum_qos=getattr(properties, "MaximumQoS", 2),
                retain_available=bool(getattr(properties, "RetainAvailable", 1)),
                subscription_identifiers=v5
                and bool(getattr(properties, "SubscriptionIdentifierAvailable", 1)),
                keepalive=getattr(properties, "ServerKeepAlive", None),
            )
        )

    def _on_subscribe(self, _client: Any, _data: Any, packet_id: int, codes: Any, _properties: Any) -> None:
        self._events.append(Suback(packet_id, tuple(code.value for code in codes)))

    def _on_unsubscribe(
        self, _client: Any, _data: Any, packet_id: int, _codes: Any, _properties: Any
    ) -> None:
        self._events.append(Unsuback(packet_id))

    def _on_disconnect(
        self, _client: Any, _data: Any, flags: Any, reason: ReasonCode, _properties: Any
    ) -> None:
        if flags.is_disconnect_packet_from_server:
            self._events.append(Goodbye(reason.value, str(reason).lower()))
