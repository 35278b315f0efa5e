"""Tools of the tests: brokers, a network that breaks on demand, and how to wait for things."""

from __future__ import annotations

from tests.support.broker import Broker, BrokerMissing, RemoteBroker, find_broker
from tests.support.clock import FakeClock
from tests.support.leak import LeakCheck
from tests.support.packet import Packet, PacketType
from tests.support.proxy import FaultProxy
from tests.support.scripted import (
    ConnectionEnded,
    ScriptedBroker,
    ScriptedConnection,
    accept_and_leave,
    accept_and_serve,
)
from tests.support.traffic import Traffic, numbers
from tests.support.wait import eventually

__all__ = [
    "Broker",
    "BrokerMissing",
    "ConnectionEnded",
    "FakeClock",
    "FaultProxy",
    "LeakCheck",
    "Packet",
    "PacketType",
    "RemoteBroker",
    "ScriptedBroker",
    "ScriptedConnection",
    "Traffic",
    "accept_and_leave",
    "accept_and_serve",
    "eventually",
    "find_broker",
    "numbers",
]
