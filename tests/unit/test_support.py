"""The tests' own tools do what they say, as far as that needs no broker."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support import (
    Broker,
    BrokerMissing,
    FakeClock,
    LeakCheck,
    PacketType,
    eventually,
)
from tests.support import packet as mqtt
from tests.support.packet import Property
from tests.support.port import address_of

ROOT = Path(__file__).parents[2]


# -- waiting, clock, ports ----------------------------------------------------------------


def test_eventually_returns_the_first_true_answer():
    answers = iter([0, None, "", "there"])
    assert eventually(lambda: next(answers), interval=0) == "there"


def test_eventually_says_what_it_waited_for():
    with pytest.raises(AssertionError, match=r"not within 0\.01 s: the moon .*last answer: 0"):
        eventually(lambda: 0, 0.01, "the moon")
    with pytest.raises(AssertionError, match="asked late"):
        eventually(lambda: False, 0.01, lambda: "asked late")


def test_eventually_lets_errors_of_the_predicate_pass():
    with pytest.raises(ZeroDivisionError):
        eventually(lambda: 1 / 0)


def test_fake_clock_moves_only_when_told():
    clock = FakeClock(5)
    assert [clock(), clock()] == [5, 5]
    clock.advance(2.5)
    assert clock() == 7.5
    with pytest.raises(AssertionError):
        clock.advance(-1)


def test_address_of_a_url():
    assert address_of("mqtt://user:word@example.org:1999") == ("example.org", 1999)
    assert address_of("mqtt://[::1]") == ("::1", 1883)


# -- leaks --------------------------------------------------------------------------------


def test_leak_check_sees_a_thread_of_ours_until_it_ends():
    check, leave = LeakCheck(), threading.Event()
    thread = threading.Thread(target=leave.wait, name="tars-mqtt/someone/network", daemon=True)
    thread.start()
    with pytest.raises(AssertionError, match="thread 'tars-mqtt/someone/network' is still running"):
        check.assert_clean(grace=0)
    leave.set()
    thread.join()
    check.assert_clean()


def test_leak_check_leaves_other_threads_alone():
    check, leave = LeakCheck(), threading.Event()
    thread = threading.Thread(target=leave.wait, name="somebody else's", daemon=True)
    thread.start()
    check.assert_clean(grace=0)
    leave.set()
    thread.join()


# -- packets ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packet", "data"),
    [
        (mqtt.connack(5), "20 02 00 05"),
        (mqtt.connack(session_present=True), "20 02 01 00"),
        (mqtt.connack(0x87, level=mqtt.V5), "20 03 00 87 00"),
        (mqtt.connack(level=5, properties={Property.RECEIVE_MAXIMUM: 10}), "20 06 00 00 03 21 00 0a"),
        (mqtt.publish("a/b", b"hi"), "30 07 00 03 612f62 6869"),
        (mqtt.publish("a", b"", qos=1, packet_id=10, retain=True, dup=True), "3b 05 00 01 61 00 0a"),
        (
            mqtt.publish("a", b"x", level=5, properties={Property.SUBSCRIPTION_IDENTIFIER: 200}),
            "30 08 0001 61 03 0b c801 78",
        ),
        (mqtt.puback(1), "40 02 00 01"),
        (mqtt.puback(1, 0x87), "40 03 00 01 87"),
        (mqtt.pubrec(1), "50 02 00 01"),
        (mqtt.pubrel(1), "62 02 00 01"),
        (mqtt.pubcomp(1), "70 02 00 01"),
        (mqtt.subscribe(3, ("a/#", 1)), "82 08 00 03 00 03 612f23 01"),
        (mqtt.suback(2, [0, 0x80]), "90 04 00 02 00 80"),
        (mqtt.suback(2, [0x87], level=5), "90 04 00 02 00 87"),
        (mqtt.unsuback(2, [0]), "b0 02 00 02"),
        (mqtt.unsuback(2, [0], level=5), "b0 04 00 02 00 00"),
        (mqtt.pingreq(), "c0 00"),
        (mqtt.pingresp(), "d0 00"),
        (mqtt.disconnect(), "e0 00"),
        (mqtt.disconnect(0x8E), "e0 02 8e 00"),
        (mqtt.connect("me"), "10 0e 0004 4d515454 04 02 003c 0002 6d65"),
        (mqtt.connect("me", level=5, clean=False), "10 0f 0004 4d515454 05 00 003c 00 0002 6d65"),
    ],
    ids=lambda value: value.hex() if isinstance(value, bytes) else "",
)
def test_packets_are_the_bytes_of_the_standard(packet, data):
    assert packet.hex() == data.replace(" ", "")


@pytest.mark.parametrize("size", [0, 127, 128, 16_383, 16_384, 2_097_152])
def test_packets_of_every_length_are_read_as_they_were_written(size):
    data = mqtt.packet(PacketType.PUBLISH, 0, b"x" * size)
    at = 0

    def take(count):
        nonlocal at
        at += count
        return data[at - count : at]

    assert mqtt.read_packet(take).body == b"x" * size
    assert at == len(data)


def test_publish_with_properties_is_read_as_it_was_written():
    properties = {
        Property.CONTENT_TYPE: ["text"],
        Property.MESSAGE_EXPIRY_INTERVAL: [70_000],
        Property.CORRELATION_DATA: [b"\x00\x01"],
        Property.SUBSCRIPTION_IDENTIFIER: [1, 300],
        Property.USER_PROPERTY: [("a", "b"), ("a", "c")],
        Property.TOPIC_ALIAS: [3],
        Property.PAYLOAD_FORMAT_INDICATOR: [1],
    }
    data = mqtt.publish("t", b"pay", qos=2, packet_id=9, level=5, properties=properties)
    packet = mqtt.Packet(PacketType.PUBLISH, data[0] & 0x0F, data[2:])
    assert mqtt.read_publish(packet, 5) == mqtt.Publish("t", b"pay", 2, False, False, 9, properties)


def test_connect_is_read_with_will_and_credentials():
    body = bytes.fromhex(
        "0004 4d515454 05 ee 0014 05 11 00000e10 0002 6d65 02 01 01 0001 77 0002 6869 0001 75 0002 7077"
    )
    connect = mqtt.read_connect(mqtt.Packet(PacketType.CONNECT, 0, body))
    assert connect == mqtt.Connect(
        level=5,
        client_id="me",
        clean=True,
        keepalive=20,
        properties={Property.SESSION_EXPIRY_INTERVAL: [3600]},
        will=mqtt.Will("w", b"hi", 1, True, {Property.PAYLOAD_FORMAT_INDICATOR: [1]}),
        username="u",
        password=b"pw",
    )


# -- finding a broker ---------------------------------------------------------------------


def find(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``scripts/broker`` where nothing but bash is on PATH, from another directory."""
    system = tmp_path / "bin"
    system.mkdir(exist_ok=True)
    return subprocess.run(
        ["/bin/bash", str(ROOT / "scripts" / "broker"), *arguments],
        env={"PATH": str(system), **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


def program(path: Path, body: str = "exit 0") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return path


def test_a_url_comes_before_all_other_brokers(tmp_path):
    program(tmp_path / "bin" / "mosquitto")
    search = find(tmp_path, MQTT_TEST_URL="mqtt://elsewhere:1")
    assert (search.returncode, search.stdout) == (0, "mqtt://elsewhere:1\n")


def test_a_binary_comes_before_docker(tmp_path):
    binary = program(tmp_path / "bin" / "mosquitto")
    program(tmp_path / "bin" / "docker")
    search = find(tmp_path)
    assert (search.returncode, search.stdout) == (0, f"{binary}\n")


def test_an_unknown_argument_is_refused(tmp_path):
    search = find(tmp_path, "fetch")
    assert search.returncode == 2
    assert "fetch" in search.stderr


def test_a_url_is_no_broker_to_harm():
    with pytest.raises(BrokerMissing, match="MQTT_TEST_URL"):
        Broker(mosquitto="mqtt://elsewhere:1")


def test_a_mosquitto_that_does_not_start_says_why(tmp_path):
    binary = program(tmp_path / "mosquitto", "echo 'Error: no such option'; exit 3")
    broker = Broker(mosquitto=str(binary))
    with pytest.raises(AssertionError, match="Error: no such option"):
        broker.start()
    broker.close()
    assert not broker.directory.exists()


def test_a_mosquitto_that_forgets_a_signal_is_asked_again(tmp_path):
    binary = program(
        tmp_path / "mosquitto",
        f"""exec {sys.executable} - "$@" <<'PROGRAM'
import pathlib, signal, socket, sys

signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGTERM}})
config = pathlib.Path(sys.argv[-1]).read_text()
listener = socket.create_server(("127.0.0.1", int(config.split()[1])))
print("mosquitto is running", flush=True)
signal.sigwait({{signal.SIGTERM}})
print("forgotten", flush=True)
signal.sigwait({{signal.SIGTERM}})
PROGRAM""",
    )
    with Broker(mosquitto=str(binary)) as broker:
        broker.terminate()
        assert not broker.running
        assert broker.log.endswith("forgotten\n")
