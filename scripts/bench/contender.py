"""Who is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

BARE = "socket"


@attrs.frozen(kw_only=True)
class Contender:
    """One client in one configuration.

    Args:
        name: For the command line and the tables.
        adapter: Module of `bench.clients` and class.
        imports: What its user imports; empty where another contender imports the same.
        distribution: The package whose version is reported; empty for no client at all.
        settings: For its constructor.
        path: A directory to import it from, instead of what is installed.
    """

    name: str
    adapter: str
    imports: str
    distribution: str
    settings: Mapping[str, Any] = attrs.field(factory=dict)
    path: str | None = None

    @property
    def ours(self) -> bool:
        return self.distribution == "tars-mqtt"

    @property
    def bare(self) -> bool:
        """Whether it is no client: it shows what the broker and the machine allow, and nobody competes with it."""
        return not self.distribution

    @property
    def threaded(self) -> bool:
        """Whether it is for threads; the others are for asyncio."""
        return self.adapter in {"tars.Threaded", "paho.Paho"}


def _ours(name: str, adapter: str, imports: str = "", **settings: Any) -> Contender:
    return Contender(name=name, adapter=adapter, imports=imports, distribution="tars-mqtt", settings=settings)


CONTENDERS = (
    _ours("tars", "tars.Threaded", "tars_mqtt"),
    _ours("tars-3.1.1", "tars.Threaded", protocol="3.1.1"),
    _ours("tars.aio", "tars_aio.Looped", "tars_mqtt.aio"),
    _ours("tars.aio-3.1.1", "tars_aio.Looped", protocol="3.1.1"),
    Contender(name="paho", adapter="paho.Paho", imports="paho.mqtt.client", distribution="paho-mqtt"),
    Contender(name="aiomqtt", adapter="aiomqtt.Aiomqtt", imports="aiomqtt", distribution="aiomqtt"),
    Contender(name="gmqtt", adapter="gmqtt.Gmqtt", imports="gmqtt", distribution="gmqtt"),
    Contender(name="zmqtt", adapter="zmqtt.Zmqtt", imports="zmqtt", distribution="zmqtt"),
    Contender(
        name="faststream",
        adapter="faststream.FastStream",
        imports="faststream.mqtt",
        distribution="faststream",
    ),
    Contender(name=BARE, adapter="bare.Bare", imports="", distribution=""),
)
