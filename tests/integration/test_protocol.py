"""Which version of MQTT is spoken, and what a broker's answer to CONNECT means."""

from __future__ import annotations

import time

import pytest

from tars_mqtt import ConnectError, ConnectionState, ConnectRefusedError
from tests.support import FaultProxy, PacketType, ScriptedBroker, eventually
from tests.support import packet as mqtt
from tests.support.packet import Property

V311, V5 = mqtt.V311, mqtt.V5

UNSUPPORTED = 0x84
UNSUPPORTED_311 = 0x01


def serve(connection) -> None:
    connection.accept()
    connection.serve()


def levels(broker) -> list[int]:
    return [mqtt.read_connect(packet).level for packet in broker.received(PacketType.CONNECT)]


# -- brokers that do not speak MQTT 5 -----------------------------------------------------------


def refuse_as_5(connection) -> None:
    connection.accept(UNSUPPORTED)


def refuse_as_311(connection) -> None:
    """What a broker of MQTT 3.1.1 answers: its own CONNACK of two bytes, as amqtt does."""
    connection.expect(PacketType.CONNECT)
    connection.send(mqtt.connack(UNSUPPORTED_311, level=V311))


def hang_up(connection) -> None:
    connection.expect(PacketType.CONNECT)


def reset(connection) -> None:
    connection.expect(PacketType.CONNECT)
    connection.reset()


def never_answer(connection) -> None:
    """As RabbitMQ 3.10 does."""
    connection.expect(PacketType.CONNECT)
    connection.hold()


def old_broker(refusal):
    """A broker that speaks MQTT 3.1.1 only, and says so in this way."""

    def script(connection) -> None:
        connect = mqtt.read_connect(connection.read())
        if connect.level == V5:
            connection.packets.pop()
            connection.refused = True
            connection.read = iter_first(connection, connect)
        serve(connection)

    return script


REFUSALS = [refuse_as_5, refuse_as_311, hang_up, reset, never_answer]
