"""The tests' own tools do what they say: brokers and the network between."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import pytest

from tests.support import (
    Broker,
    ConnectionEnded,
    FaultProxy,
    LeakCheck,
    PacketType,
    ScriptedBroker,
    eventually,
    find_broker,
)
from tests.support import packet as mqtt
from tests.support.port import HOST, free_port, is_listening

ROOT = Path(__file__).parents[2]


class Client:
    """A client that sends and reads bytes as it is told."""

    def __init__(self, port: int, host: str = HOST) -> None:
        self.socket = socket.create_connection((host, port), 5)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *packets: bytes) -> None:
        self.socket.sendall(b"".join(packets))

    def receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            chunk = self.socket.recv(count - len(data))
            if not chunk:
                raise EOFError
            data += chunk
        return data

    def read(self) -> mqtt.Packet:
        return mqtt.read_packet(self.receive)

    def is_silent(self, seconds: float = 0.05) -> bool:
        self.socket.settimeout(seconds)
        try:
            return bool(self.socket.recv(1)) and False
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(5)


def connect_and_listen(port: int) -> None:
    """For connections that may be reset as early as they are made."""
    with Client(port) as client:
        client.receive(1)


def echo(connection) -> None:
    """A script: what comes goes back."""
    while True:
        packet = connection.read()
        connection.send(mqtt.packet(packet.type, packet.flags, packet.body))


# -- ports and leaks ----------------------------------------------------------------------


def test_free_port_is_free_and_never_one_of_an_outgoing_connection():
    for _ in range(20):
        port = free_port()
        assert port < 32_768
        assert not is_listening(HOST, port)


def test_a_port_is_given_once_on_the_whole_machine():
    ask = "import sys; from tests.support import port; print(*map(port._reserve, map(int, sys.argv[1:])))"
    given, other = free_port(), 1  # nobody is given port 1
    command = [sys.executable, "-c", ask, str(given), str(other)]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert asked.stdout.split() == ["False", "True"]


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="the system does not list open files")
def test_leak_check_sees_an_open_socket_until_it_is_closed():
    check = LeakCheck()
    with socket.create_server((HOST, 0)) as server:
        (leak,) = check.leaks()
        assert f"{server.getsockname()}, not connected) is still open" in leak
    check.assert_clean()


# -- the scripted broker ------------------------------------------------------------------


def test_a_script_refuses_a_client():
    with ScriptedBroker(lambda connection: connection.accept(5)) as broker, Client(broker.port) as client:
        client.send(mqtt.connect("me"))
        assert client.read() == (PacketType.CONNACK, 0, b"\x00\x05")
        with pytest.raises(EOFError):
            client.read()
    assert [packet.type for packet in broker.packets] == [PacketType.CONNECT]


def test_a_serving_script_answers_as_the_standard_wants():
    def script(connection) -> None:
        assert connection.accept().client_id == "me"
        connection.serve()

    with ScriptedBroker(script) as broker, Client(broker.port) as client:
        client.send(mqtt.connect("me", level=5))
        assert client.read().body == b"\x00\x00\x00"
        client.send(mqtt.subscribe(1, ("a", 1), ("b", 2), level=5))
        assert client.read() == (PacketType.SUBACK, 0, b"\x00\x01\x00\x01\x02")
        client.send(mqtt.publish("t", b"", level=5), mqtt.publish("t", b"", qos=1, packet_id=7, level=5))
        assert client.read() == (PacketType.PUBACK, 0, b"\x00\x07")
        client.send(mqtt.publish("t", b"", qos=2, packet_id=8, level=5))
        assert client.read() == (PacketType.PUBREC, 0, b"\x00\x08")
        client.send(mqtt.pubrel(8), mqtt.pingreq())
        assert client.read() == (PacketType.PUBCOMP, 0, b"\x00\x08")
        assert client.read().type == PacketType.PINGRESP
        client.send(mqtt.disconnect())
        with pytest.raises(EOFError):
            client.read()
        assert len(broker.received(PacketType.PUBLISH)) == 3


def test_a_serving_script_does_some_things_otherwise():
    def twice(connection):
        def instead(packet) -> bool:
            if packet.type == PacketType.PUBLISH:
                identifier = mqtt.read_publish(packet).packet_id
                connection.send(mqtt.puback(identifier), mqtt.puback(identifier))
                return True
            return False

        connection.accept()
        connection.serve(instead)

    with ScriptedBroker(twice) as broker, Client(broker.port) as client:
        client.send(mqtt.connect("me"), mqtt.publish("t", b"", qos=1, packet_id=7), mqtt.pingreq())
        kinds = [client.read().type for _ in range(4)]
    assert kinds == [PacketType.CONNACK, PacketType.PUBACK, PacketType.PUBACK, PacketType.PINGRESP]


def test_each_connection_has_its_script_and_the_last_one_stays():
    scripts = [lambda connection, code=code: connection.accept(code) for code in (3, 0)]
    codes = []
    with ScriptedBroker(*scripts) as broker:
        for _ in range(3):
            with Client(broker.port) as client:
                client.send(mqtt.connect("me"))
                codes.append(client.read().body[1])
        assert [connection.number for connection in broker.connections] == [1, 2, 3]
        assert len(broker.wait_for(PacketType.CONNECT, 3)) == 3
    assert codes == [3, 0, 0]


def test_a_script_that_expects_something_else_fails_the_test():
    def script(connection) -> None:
        connection.expect(PacketType.SUBSCRIBE)

    broker = ScriptedBroker(script)
    with Client(broker.port) as client:
        client.send(mqtt.pingreq(), mqtt.connect("me"))
        assert client.read().type == PacketType.PINGRESP
        with pytest.raises(EOFError):
            client.read()
    with pytest.raises(AssertionError, match="expected SUBSCRIBE, the client sent <CONNECT"):
        broker.close()
    broker.close()


def test_a_holding_script_says_nothing_and_ends_with_the_broker():
    broker = ScriptedBroker(lambda connection: connection.hold())
    with Client(broker.port) as client:
        client.send(mqtt.connect("me"))
        broker.wait_for(PacketType.CONNECT)
        assert client.is_silent()
        broker.close()
        with pytest.raises(EOFError):
            client.receive(1)


def test_a_script_may_reset_the_connection_and_notices_when_the_client_leaves():
    ended = []

    def notice(connection) -> None:
        try:
            connection.read()
        except ConnectionEnded:
            ended.append(connection.number)
            raise

    with ScriptedBroker(lambda connection: connection.reset(), notice) as broker:
        with pytest.raises(ConnectionResetError):
            connect_and_listen(broker.port)
        Client(broker.port).socket.close()
        eventually(lambda: ended == [2])


# -- the proxy ----------------------------------------------------------------------------


@pytest.fixture
def upstream():
    with ScriptedBroker(echo) as broker:
        yield broker


@pytest.fixture
def echoed(upstream):
    with FaultProxy(upstream.url, record=True) as proxy:
        yield proxy


PING = mqtt.pingreq()
MESSAGE = mqtt.publish("t", b"0123456789")


def test_proxy_passes_on_and_counts(echoed):
    with Client(echoed.port) as one, Client(echoed.port) as other:
        one.send(PING, MESSAGE)
        assert one.receive(len(PING + MESSAGE)) == PING + MESSAGE
        other.send(PING)
        assert other.receive(2) == PING
        assert (echoed.connections, echoed.open_connections) == (2, 2)
    eventually(lambda: echoed.open_connections == 0)
    assert echoed.bytes_passed == {
        "to_broker": len(PING + MESSAGE + PING),
        "to_client": len(PING + MESSAGE + PING),
    }
    assert [packet.type for packet in echoed.packets("to_broker", 0)] == [
        PacketType.PINGREQ,
        PacketType.PUBLISH,
    ]
    assert [packet.type for packet in echoed.packets("to_client")] == [PacketType.PINGREQ]


def test_proxy_passes_an_end_on(echoed, upstream):
    with Client(echoed.port) as client:
        client.send(PING)
        client.receive(2)
        client.socket.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            client.receive(1)
    eventually(lambda: echoed.open_connections == 0)


def test_cut_resets_both_sides_and_lets_new_connections_through():
    ends = []

    def script(connection) -> None:
        try:
            connection.hold()
        except ConnectionEnded as ended:
            ends.append(str(ended))
            raise

    with ScriptedBroker(script) as broker, FaultProxy(broker.url) as proxy, Client(proxy.port) as client:
        client.send(PING)
        broker.wait_for(PacketType.PINGREQ)
        proxy.cut()
        assert proxy.open_connections == 0
        with pytest.raises(ConnectionResetError):
            client.receive(1)
        eventually(lambda: any("reset" in end.lower() for end in ends), message=lambda: str(ends))
        with Client(proxy.port) as again:
            again.send(PING)
            broker.wait_for(PacketType.PINGREQ, 2)


def test_hang_up_ends_in_good_order(echoed):
    with Client(echoed.port) as client:
        client.send(PING)
        client.receive(2)
        echoed.hang_up()
        with pytest.raises(EOFError):
            client.receive(1)


def test_half_close_ends_one_direction_only(echoed, upstream):
    with Client(echoed.port) as client:
        client.send(PING)
        client.receive(2)
        echoed.half_close("to_client")
        with pytest.raises(EOFError):
            client.receive(1)
        client.send(MESSAGE)
        upstream.wait_for(PacketType.PUBLISH)


def test_stall_holds_everything_back_until_resume(echoed, upstream):
    with Client(echoed.port) as client:
        client.send(PING)
        client.receive(2)
        echoed.stall()
        client.send(MESSAGE)
        assert client.is_silent()
        assert upstream.received(PacketType.PUBLISH) == []
        with Client(echoed.port) as late:
            late.send(PING)
            assert late.is_silent()
            echoed.resume()
            assert late.receive(2) == PING
        assert client.receive(len(MESSAGE)) == MESSAGE


def test_stall_in_one_direction_lets_the_other_pass(echoed, upstream):
    with Client(echoed.port) as client:
        echoed.stall("to_client")
        client.send(MESSAGE)
        upstream.wait_for(PacketType.PUBLISH)
        assert client.is_silent()


def test_a_stalled_connection_can_be_cut(echoed):
    with Client(echoed.port) as client:
        client.send(PING)
        client.receive(2)
        echoed.stall()
        client.send(MESSAGE)
        echoed.cut()
        with pytest.raises(ConnectionResetError):
            client.receive(1)


def test_refuse_stops_listening_and_accept_takes_the_same_port_again(echoed):
    with Client(echoed.port) as client:
        client.send(PING)
        client.receive(2)
        echoed.refuse()
        with pytest.raises(ConnectionRefusedError):
            Client(echoed.port)
        client.send(PING)
        assert client.receive(2) == PING
        echoed.accept()
        with Client(echoed.port) as again:
            again.send(PING)
            assert again.receive(2) == PING


def test_slice_passes_on_small_pieces(echoed):
    echoed.slice(3, pause=30)
    with Client(echoed.port) as client:
        client.send(MESSAGE)
        eventually(lambda: echoed.bytes_passed["to_broker"])
        assert client.is_silent()
    assert echoed.bytes_passed["to_broker"] == 3


def test_latency_delays_each_direction(echoed):
    echoed.latency(0.1)
    with Client(echoed.port) as client:
        start = time.monotonic()
        client.send(PING)
        client.receive(2)
        assert time.monotonic() - start >= 0.2


def test_bandwidth_limits_each_direction(echoed):
    echoed.bandwidth(1000)
    message = mqtt.publish("t", bytes(200))
    with Client(echoed.port) as client:
        start = time.monotonic()
        client.send(message)
        assert client.receive(len(message)) == message
        assert time.monotonic() - start >= 0.18


def test_flip_bit_spoils_one_byte_once(echoed):
    echoed.flip_bit(5, "to_client", bit=2)
    spoilt = bytearray(MESSAGE)
    spoilt[5] ^= 4
    with Client(echoed.port) as client:
        client.send(MESSAGE)
        assert client.receive(len(MESSAGE)) == spoilt
    with Client(echoed.port) as again:
        again.send(MESSAGE)
        assert again.receive(len(MESSAGE)) == MESSAGE


def test_cut_after_ends_a_connection_in_the_middle_of_a_packet(echoed, upstream):
    echoed.cut_after(5, "to_client")
    with Client(echoed.port) as client:
        client.send(MESSAGE)
        with pytest.raises(ConnectionResetError):
            client.receive(len(MESSAGE))
    assert echoed.bytes_passed["to_client"] == 5
    with Client(echoed.port) as again:
        again.send(MESSAGE)
        assert again.receive(len(MESSAGE)) == MESSAGE


def test_proxy_resets_a_client_whose_broker_is_not_there():
    with FaultProxy(f"mqtt://{HOST}:{free_port()}") as proxy, pytest.raises(ConnectionResetError):
        connect_and_listen(proxy.port)


def test_proxy_leaves_nothing_behind_when_it_is_closed_under_load(upstream):
    check = LeakCheck()
    proxy = FaultProxy(upstream.url)
    clients = [Client(proxy.port) for _ in range(5)]
    for client in clients:
        client.send(MESSAGE * 1000)
    proxy.close()
    proxy.close()
    for client in clients:
        client.socket.close()
    eventually(lambda: not [line for line in check.leaks() if str(proxy.port) in line])


# -- a real broker ------------------------------------------------------------------------


def connected(port: int, name: str, *, clean: bool = True) -> Client:
    client = Client(port)
    client.send(mqtt.connect(name, clean=clean))
    assert client.read().type == PacketType.CONNACK
    return client


def answers(port: int) -> bool:
    try:
        with connected(port, "asking") as client:
            client.send(mqtt.pingreq())
            return client.read().type == PacketType.PINGRESP
    except (OSError, EOFError):
        return False


def test_shared_broker_answers(shared_broker, unique):
    with Client(shared_broker.port, shared_broker.host) as client:
        client.send(mqtt.connect(unique))
        assert client.read().type == PacketType.CONNACK


def test_shared_broker_can_be_reached_through_the_proxy(proxy, unique):
    with connected(proxy.port, unique) as client:
        client.send(mqtt.publish(unique, b"hi", qos=1, packet_id=3))
        assert client.read() == (PacketType.PUBACK, 0, b"\x00\x03")
    assert mqtt.read_publish(proxy.packets("to_broker")[1]).payload == b"hi"


def test_a_killed_broker_comes_back_at_the_same_address(broker):
    with connected(broker.port, "one") as client:
        broker.kill()
        assert not broker.running
        with pytest.raises((EOFError, ConnectionResetError)):
            client.receive(1)
    assert not is_listening(broker.host, broker.port)
    broker.start()
    assert answers(broker.port)
    assert broker.log.count(" running") == 2
    broker.restart()
    assert answers(broker.port)


def test_a_frozen_broker_takes_connections_and_says_nothing(broker):
    broker.freeze()
    with Client(broker.port) as client:
        client.send(mqtt.connect("one"))
        assert client.is_silent()
        broker.thaw()
        assert client.read().type == PacketType.CONNACK
    broker.freeze()
    broker.kill()
    broker.start()
    broker.freeze()
    broker.terminate()
    assert not broker.running


def test_a_persistent_broker_keeps_messages_over_a_kill(make_broker):
    broker = make_broker(persistence=True)
    with connected(broker.port, "keeper", clean=False) as client:
        client.send(mqtt.subscribe(1, ("kept", 1)))
        assert client.read().type == PacketType.SUBACK
    with connected(broker.port, "other") as client:
        client.send(mqtt.publish("kept", b"still here", qos=1, packet_id=1))
        assert client.read().type == PacketType.PUBACK
        client.send(mqtt.pingreq())
        assert client.read().type == PacketType.PINGRESP
    broker.kill()
    broker.start()
    with connected(broker.port, "keeper", clean=False) as client:
        assert mqtt.read_publish(client.read()).payload == b"still here"


def test_a_broker_with_users_lets_nobody_else_in(make_broker):
    broker = make_broker(users={"me": "s3cret"})
    connect = bytearray(mqtt.connect("one") + b"\x00\x02me\x00\x06s3cret")
    connect[1] += 12
    connect[9] |= 0xC0
    with Client(broker.port) as client:
        client.send(bytes(connect))
        assert client.read().body == b"\x00\x00"
    with Client(broker.port) as client:
        client.send(mqtt.connect("one"))
        assert client.read().body == b"\x00\x05"


def test_a_broker_takes_configuration(make_broker):
    broker = make_broker(["max_keepalive 30"])
    with Client(broker.port) as client:
        client.send(mqtt.connect("one", level=mqtt.V5, keepalive=60))
        assert b"\x13\x00\x1e" in client.read().body


def test_a_closed_broker_leaves_no_file(make_broker):
    broker = make_broker()
    broker.close()
    broker.close()
    assert not broker.running
    assert not broker.directory.exists()


DOCKER = """#!/bin/bash
# A docker that runs the machine's own mosquitto.
case $1 in
run)
    while [[ $1 != --name ]]; do shift; done
    echo $$ >"DIRECTORY/$2"
    shift 4
    exec "$MOSQUITTO" "$@" ;;
kill) kill "-${2#--signal=SIG}" "$(cat "DIRECTORY/$3")" ;;
pause) kill -STOP "$(cat "DIRECTORY/$2")" ;;
unpause) kill -CONT "$(cat "DIRECTORY/$2")" ;;
esac
"""


def test_a_broker_in_docker_is_handled_like_a_process(tmp_path, monkeypatch):
    try:
        binary = find_broker()
    except Exception:
        binary = ""
    if not Path(binary).is_file():
        pytest.skip("needs a mosquitto to play the one in docker")
    docker = tmp_path / "docker"
    docker.write_text(DOCKER.replace("DIRECTORY", str(tmp_path)))
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("MOSQUITTO", binary)
    with Broker(mosquitto="docker:eclipse-mosquitto:2") as broker:
        assert answers(broker.port)
        broker.freeze()
        with Client(broker.port) as client:
            client.send(mqtt.connect("one"))
            assert client.is_silent()
            broker.thaw()
            assert client.read().type == PacketType.CONNACK
        broker.kill()
        assert not is_listening(HOST, broker.port)
        broker.start()
        broker.restart()
        assert answers(broker.port)
