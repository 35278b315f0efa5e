"""A broker played by a script: it says what the test wants said, however wrong."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import threading
from typing import TYPE_CHECKING

from tests.support import packet as mqtt
from tests.support.packet import PacketType
from tests.support.port import HOST, free_port
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType
    from typing import Self

    from tests.support.packet import Packet

    Script = Callable[["ScriptedConnection"], object]

RESET = struct.pack("ii", 1, 0)
"""Value of SO_LINGER: closing throws away what is unsent and sends RST."""


class ConnectionEnded(Exception):
    """The client has left, or the broker is being closed. A script may let it pass."""


class ScriptedConnection:
    """One client's connection, in the hands of the script; use it from the script's thread only.

    Attributes:
        number: 1 for the broker's first connection.
        level: 4 for MQTT 3.1.1 and 5 for MQTT 5, once CONNECT was read with ``accept``.
        packets: What has been read so far.
        client_serial: The number of the certificate that the client has shown over TLS.
    """

    def __init__(self, stream: socket.socket, number: int) -> None:
        self.number = number
        self.level = mqtt.V311
        self.packets: list[Packet] = []
        self.client_serial: int | None = None
        self._stream = stream

    def secure(self, context: ssl.SSLContext) -> None:
        """Do the TLS handshake, as the server."""
        # Not in the constructor: it would hide the socket from ``interrupt`` meanwhile.
        secured = context.wrap_socket(self._stream, server_side=True, do_handshake_on_connect=False)
        self._stream = secured
        try:
            secured.do_handshake()
        except OSError as error:
            # Closing with unread bytes would be a RST, which may overtake the alert in a proxy.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(secured, socket.SHUT_WR)
                while socket.socket.recv(secured, 4096):
                    pass
            raise ConnectionEnded(str(error)) from error
        if shown := secured.getpeercert():
            self.client_serial = int(str(shown["serialNumber"]), 16)

    def read(self) -> Packet:
        packet = mqtt.read_packet(self._receive)
        self.packets.append(packet)
        return packet

    def expect(self, kind: PacketType) -> Packet:
        """The next packet, which must be of this kind. Pings are answered and passed over."""
        while (packet := self.read()).type == PacketType.PINGREQ != kind:
            self.send(mqtt.pingresp())
        assert packet.type == kind, f"expected {kind.name}, the client sent {packet}"
        return packet

    def send(self, *packets: bytes) -> None:
        """Send bytes as they are, in one piece."""
        try:
            self._stream.sendall(b"".join(packets))
        except OSError as error:
            raise ConnectionEnded(str(error)) from error

    def accept(
        self,
        code: int = 0,
        *,
        session_present: bool = False,
        properties: Mapping[int, object] | None = None,
    ) -> mqtt.Connect:
        """Read CONNECT, answer CONNACK in the client's version, and return what the client asked for."""
        connect = mqtt.read_connect(self.expect(PacketType.CONNECT))
        self.level = connect.level
        self.send(
            mqtt.connack(code, level=self.level, session_present=session_present, properties=properties)
        )
        return connect

    def serve(self, instead: Callable[[Packet], object] | None = None) -> None:
        """Behave like a good broker that delivers nothing, until the client leaves.

        Args:
            instead: Asked about each packet first; when its answer is true, it has dealt with the packet.
        """
        while True:
            packet = self.read()
            if instead is None or not instead(packet):
                self.answer(packet)

    def answer(self, packet: Packet) -> None:
        """What the standard wants as the answer to this packet, if anything."""
        match packet.type:
            case PacketType.PUBLISH:
                publish = mqtt.read_publish(packet, self.level)
                if publish.qos:
                    self.send((mqtt.puback if publish.qos == 1 else mqtt.pubrec)(publish.packet_id))
            case PacketType.PUBREC:
                self.send(mqtt.pubrel(packet.packet_id))
            case PacketType.PUBREL:
                self.send(mqtt.pubcomp(packet.packet_id))
            case PacketType.SUBSCRIBE:
                granted = [options & 3 for _, options in mqtt.read_subscribe(packet, self.level).filters]
                self.send(mqtt.suback(packet.packet_id, granted, level=self.level))
            case PacketType.UNSUBSCRIBE:
                codes = [0 for _ in mqtt.read_unsubscribe(packet, self.level)]
                self.send(mqtt.unsuback(packet.packet_id, codes, level=self.level))
            case PacketType.PINGREQ:
                self.send(mqtt.pingresp())
            case PacketType.DISCONNECT:
                raise ConnectionEnded("the client said goodbye")
            case _:
                pass

    def is_quiet(self, seconds: float) -> bool:
        """Wait for so long; False as soon as there is something to read."""
        return not select.select([self._stream], [], [], seconds)[0]

    def hold(self) -> None:
        """Say nothing more, and stay until the client leaves."""
        while True:
            self.read()

    def ignore(self) -> None:
        """Read whatever comes, be it MQTT or not, and stay until the client leaves."""
        while True:
            self._receive(1)

    def close(self) -> None:
        """End the connection in good order (FIN)."""
        with contextlib.suppress(OSError):
            self._stream.shutdown(socket.SHUT_RDWR)
        self._stream.close()

    def reset(self) -> None:
        """Tear the connection down (RST)."""
        with contextlib.suppress(OSError):
            self._stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self._stream.close()

    def interrupt(self) -> None:
        """From another thread: make a waiting script go on, with ``ConnectionEnded``."""
        with contextlib.suppress(OSError):
            self._stream.shutdown(socket.SHUT_RDWR)

    def _receive(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            try:
                chunk = self._stream.recv(count - len(data))
            except OSError as error:
                raise ConnectionEnded(str(error)) from error
            if not chunk:
                raise ConnectionEnded("the client has closed the connection")
            data += chunk
        return bytes(data)


def accept_and_serve(connection: ScriptedConnection) -> None:
    """A script: a good broker that delivers nothing, and remembers nothing."""
    connection.accept()
    connection.serve()


def accept_and_leave(connection: ScriptedConnection) -> None:
    """A script: a broker that ends the connection as soon as it stands."""
    connection.accept()


class ScriptedBroker:
    """Listens, and gives each connection to a script, on a thread of its own.

    The connection ends when its script returns. What a script raises, a failed ``assert`` for instance, is
    raised again where the broker is closed.

    Args:
        scripts: The first connection is played by the first of them and so on; the last one plays all
            connections that still come.
        tls: With it, connections begin with a TLS handshake.
    """

    def __init__(self, *scripts: Script, tls: ssl.SSLContext | None = None) -> None:
        assert scripts, "a broker needs a script"
        self.port = free_port()
        self.url = f"{'mqtts' if tls else 'mqtt'}://{HOST}:{self.port}"
        self._tls = tls
        self.connections: list[ScriptedConnection] = []
        self._scripts = scripts
        self._errors: list[BaseException] = []
        self._listener = socket.create_server((HOST, self.port))
        self._threads = [threading.Thread(target=self._accept, name="scripted-broker", daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except BaseException as own:
            if error is None:
                raise
            error.add_note(f"the scripted broker failed as well: {own!r}")

    @property
    def packets(self) -> list[Packet]:
        """Everything read so far, connection by connection."""
        return [packet for connection in self.connections for packet in list(connection.packets)]

    def received(self, kind: PacketType) -> list[Packet]:
        return [packet for packet in self.packets if packet.type == kind]

    def wait_for(self, kind: PacketType, count: int = 1, timeout: float = 10.0) -> list[Packet]:
        """The packets of this kind, as soon as there are *count* of them."""

        def enough() -> list[Packet]:
            found = self.received(kind)
            return found if len(found) >= count else []

        return eventually(enough, timeout, lambda: f"{count} {kind.name} in {self.packets}")

    def close(self) -> None:
        """End all connections and threads, and raise what a script raised. May be called twice."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # close() alone would not wake the accepting thread
        self._listener.close()
        self._threads[0].join(10)
        for connection in self.connections:
            connection.interrupt()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive(), f"{thread.name} does not end"
        if self._errors:
            raise self._errors.pop(0)

    def _accept(self) -> None:
        while True:
            try:
                stream, _ = self._listener.accept()
            except OSError:
                return
            number = len(self.connections) + 1
            connection = ScriptedConnection(stream, number)
            self.connections.append(connection)
            script = self._scripts[min(number, len(self._scripts)) - 1]
            thread = threading.Thread(
                target=self._play, args=(script, connection), name=f"scripted-broker/{number}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _play(self, script: Script, connection: ScriptedConnection) -> None:
        try:
            if self._tls is not None:
                connection.secure(self._tls)
            script(connection)
        except ConnectionEnded:
            pass
        except BaseException as error:
            self._errors.append(error)
        finally:
            connection.close()
