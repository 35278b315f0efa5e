"""The only module that knows paho-mqtt.

paho speaks CONNECT, SUBSCRIBE, UNSUBSCRIBE and DISCONNECT with their answers, through its documented
functions for a foreign loop (``loop_read``, ``loop_write``). What it believes to be its socket is
a `_Port`: it sees the control packets only. The packets of the message flow (PUBLISH, its
acknowledgements, PINGREQ) go past it, see `tars_mqtt._core.wire`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from tars_mqtt._core import wire
from tars_mqtt._core.event import (
    LAST_PAHO_PACKET_ID,
    PAHO_PACKETS,
    Connack,
    ConnectRequest,
    Disconnect,
    Event,
    Suback,
    Unsuback,
)
from tars_mqtt._core.stream import ConnectionLostError, Stream
from tars_mqtt.errors import ConnectError
from tars_mqtt.printable import printable

_MOST_CONTROL_BYTES = 262_144
"""Of one packet for paho: it makes objects of all their properties, on the network thread."""


class _Port:
    """What paho holds in place of a socket."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._unread = b""
        self.packets_sent = 0

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
        self.packets_sent += 1  # paho gives a packet in one piece
        return len(data)

    def close(self) -> None:
        pass  # the stream outlives this: a DISCONNECT that paho "sent" is still to be flushed

    def fileno(self) -> int:
        return self._stream.fileno()

    def setblocking(self, flag: bool) -> None:
        pass


class _Paho(mqtt.Client):
    """paho's client on our stream. Overrides the two private hooks that it has no option for."""

    next_socket: _Port | None = None
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


class Control:
    """The control packets of one connection after the other, in one version of MQTT.

    Owned by the network thread but for `client`.

    Args:
        wake: Called, on any thread, when paho has something to write.
    """

    def __init__(self, client_id: str, version: int, clean: bool, wake: Callable[[], None]) -> None:
        self.version = version
        self._v5 = version == mqtt.MQTTv5
        self._port: _Port | None = None
        self._events: list[Event] = []
        self._connack_body = b""
        options: dict[str, Any] = {} if self._v5 else {"clean_session": clean}
        self.client = client = _Paho(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=MQTTProtocolVersion(version),
            reconnect_on_failure=False,
            **options,
        )
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_unsubscribe = self._on_unsubscribe
        client.on_disconnect = self._on_disconnect
        # Its presence keeps paho from writing on whichever thread calls it.
        client.on_socket_register_write = lambda *_: wake()

    def open(self, stream: Stream, request: ConnectRequest) -> None:
        """Write CONNECT."""
        self._port = _Port(stream)
        client = self.client
        client.next_socket = self._port
        # paho leaves out a password without a user name.
        nameless = request.username is None and request.password is not None
        client.username_pw_set("" if nameless else request.username, request.password)
        if (will := request.will) is not None:  # otherwise what somebody may have set through `client` stays
            client.will_set(will.topic, will.payload, will.qos, will.retain)
        address = request.url.host or "localhost", request.url.port or 1
        if self._v5:
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

    @property
    def wants_messages(self) -> bool:
        """Whether a message that no subscription of ours matches has a taker in paho."""
        return self.client.wants_messages or self.client.on_message is not None

    @property
    def has_asked(self) -> bool:
        """Whether more was written than CONNECT and DISCONNECT, so that the broker may have answers, or messages."""
        return self._port is not None and self._port.packets_sent > 2

    def write(self) -> None:
        """Let paho write what it has."""
        if self.client.want_write():
            self.client.loop_write()

    def subscribe(self, topic_filter: str, qos: int, identifier: int | None) -> int:
        """Write SUBSCRIBE for one filter and return its packet id."""
        if self._v5:
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

    def disconnect(self) -> None:
        """Write DISCONNECT."""
        self.client.disconnect()
        self.client.loop_write()

    def drop(self) -> None:
        """Forget the connection."""
        self._port = None
        # paho forgets its port; with a new one at hand it would think itself connected.
        self.disconnect()

    def read(self, first: int, body: bytes) -> list[Event]:
        """Let paho read one packet; return what it says of it.

        Raises:
            ConnectionLostError: It is malformed.
        """
        port = self._port
        if port is None:
            raise ConnectionLostError("there is no connection")
        if len(body) > _MOST_CONTROL_BYTES and first & 0xF0 in PAHO_PACKETS:
            raise ConnectionLostError(f"the broker sent a packet of type {first >> 4} that is too large")
        if first == wire.CONNACK:
            self._connack_body = body
        port.feed(bytes((first,)) + wire.encode_varint(len(body)) + body)
        try:
            code = self.client.loop_read()
        except Exception as error:
            raise ConnectionLostError(
                f"the broker sent a malformed packet: {printable(str(error))}"
            ) from error
        events, self._events = self._events, []
        if events:
            return events
        if first == wire.CONNACK and len(body) == 2:
            # paho reports neither a refused protocol version of MQTT 3.1.1 nor a CONNACK in the
            # old form that answers a CONNECT of MQTT 5: both mean that the version is not spoken.
            return [Connack(code=1, reason="unsupported protocol version", session_present=False)]
        if first == wire.CONNACK and len(body) > 2 and body[1] >= 0x80:
            # Nor a refusal for a reason that it does not expect here.
            reason = wire.reason_name(body[1]).lower()
            return [Connack(code=body[1], reason=reason, session_present=False)]
        if code != mqtt.MQTT_ERR_SUCCESS:
            raise ConnectionLostError(f"the broker sent a malformed packet (type {first >> 4})")
        return []

    # paho's callbacks: they only enqueue, and never raise.

    def _on_connect(self, _client: Any, _data: Any, flags: Any, reason: ReasonCode, properties: Any) -> None:
        v5 = self._v5
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
            self._events.append(Disconnect(reason.value, str(reason).lower()))
