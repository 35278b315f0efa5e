"""Getting one connection: which broker, which version of MQTT, and what its answer means."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import attrs

from tars_mqtt._core import wire
from tars_mqtt._core.aside import Aside, Start
from tars_mqtt._core.dial import LastingError, dial
from tars_mqtt._core.event import Connack, ConnectRequest, Disconnect, Event, Will
from tars_mqtt._core.limit import Limit
from tars_mqtt._core.secret import Login, Secrets
from tars_mqtt._core.stream import ConnectionLostError, TLSAlertError
from tars_mqtt._core.transport import Transport
from tars_mqtt.config import MQTTClientConfig
from tars_mqtt.errors import ConfigError, ConnectError, ConnectRefusedError
from tars_mqtt.url import BrokerURL, parse_proxy

logger = logging.getLogger("tars_mqtt.session")

MQTT_5 = 5
MQTT_3_1_1 = 4

_UNSUPPORTED_VERSION = frozenset((0x01, 0x84))

_RETRIABLE = frozenset((0x03, 0x80, 0x81, 0x82, 0x83, 0x88, 0x89, 0x97, 0x9C, 0x9F))
"""CONNACK codes that another attempt may cure; 0x03 is "server unavailable" of MQTT 3.1.1."""


@attrs.frozen(kw_only=True)
class Connection:
    """A connection as it begins."""

    url: BrokerURL
    version: int
    connack: Connack
    events: list[Event]
    """What came right behind the CONNACK."""


def curable(error: ConnectError | ConfigError) -> bool:
    """Whether another attempt may succeed without anybody mending something."""
    if isinstance(error, ConnectRefusedError):
        return error.retriable
    return not isinstance(error, (ConfigError, LastingError))


class VersionRefusedError(Exception):
    """This version of the protocol did not work out; another may."""


class NoConnackError(ConnectionLostError):
    """The broker speaks MQTT, or nothing at all, and did not answer CONNECT."""


class Connector:
    """Tries the brokers in turn, the last good one first. Owned by the network thread.

    With ``protocol="auto"`` a broker is asked for MQTT 5 first, and for 3.1.1 when it refuses that,
    hangs up on it or does not answer it; what it spoke is remembered.
    """

    def __init__(
        self,
        config: MQTTClientConfig,
        transport: Transport,
        will: Callable[[], Will | None],
        start_call: Start | None = None,
    ) -> None:
        self._config = config
        self._transport = transport
        self._secrets = Secrets(config, Aside(transport, config.client_id, start_call))
        self._proxy = parse_proxy(config.proxy) if config.proxy else None
        _import_needed(config)
        self._will = will
        self._urls = deque(config.urls)
        self._spoken: dict[BrokerURL, int] = {}

    @property
    def url(self) -> BrokerURL:
        """The broker that is asked first."""
        return self._urls[0]

    def connect(self, called_off: Callable[[], bool], wanted_by: float = math.inf) -> Connection:
        """Get one connection, from the first broker that gives one; they share ``connect_timeout`` evenly.

        Args:
            called_off: Asked again and again; when it is true, there is to be no connection any more.
            wanted_by: When somebody gives up who waits for it, on the monotonic clock: each broker is to have
                its turn before.

        Raises:
            ConnectError: None does; of a kind that is not `curable` when that is true of each.
            ConfigError: A setting cannot be used, with any of them.
            Interrupted: The client is leaving.
        """
        failures: list[ConnectError | ConfigError] = []
        until = time.monotonic() + self._config.connect_timeout
        # What the user's functions take must leave time for the brokers.
        self._secrets.ask(self.url, Limit(until, called_off).share(2))
        for left in range(len(self._urls), 0, -1):
            # A silent broker must leave the others time.
            end = min(until, wanted_by) if left > 1 and wanted_by > time.monotonic() else until
            try:
                return self._try(self.url, Limit(end, called_off).share(left))
            except (ConnectError, ConfigError) as error:
                failures.append(error)
                self._transport.drop()
                self._urls.rotate(-1)
        first = next(filter(curable, failures), failures[0])
        alike = len(set(map(str, failures))) == 1
        if alike or all(isinstance(each, ConnectRefusedError) for each in failures):
            raise first
        text = "; ".join(map(str, failures))
        raise ConnectError(text) if curable(first) else LastingError(text)

    def _try(self, url: BrokerURL, limit: Limit) -> Connection:
        login = self._secrets.login(url)
        versions = self._versions(url)
        for number, version in enumerate(versions, start=1):
            last = number == len(versions)
            try:
                connection = self._handshake(url, version, login, limit, last)
            except VersionRefusedError as error:
                self._transport.drop()
                self._spoken.pop(url, None)
                if last:
                    raise ConnectError(f"no connection to {url}: {error}") from None
                logger.info(
                    "MQTT 5: %s; trying MQTT 3.1.1", error, extra={"client_id": self._config.client_id}
                )
            except ConnectionLostError as error:
                if self._spoken.get(url) == MQTT_5:
                    del self._spoken[url]  # another broker may be there by now
                raise ConnectError(f"no connection to {url}: {error}") from None
            else:
                self._spoken[url] = version
                return connection
        raise AssertionError("unreachable")

    def _versions(self, url: BrokerURL) -> tuple[int, ...]:
        if self._config.protocol != "auto":
            return (MQTT_3_1_1 if self._config.protocol == "3.1.1" else MQTT_5,)
        if url in self._spoken:
            return (self._spoken[url],)
        return MQTT_5, MQTT_3_1_1

    def _handshake(
        self,
        url: BrokerURL,
        version: int,
        login: Login,
        limit: Limit,
        last: bool,
    ) -> Connection:
        config = self._config
        username, password = login
        request = ConnectRequest(
            url=url,
            version=version,
            client_id=config.client_id,
            username=username,
            password=password,
            keepalive=config.keepalive,
            session_expiry=int(config.session_expiry),
            receive_maximum=min(config.max_pending, 65_535),
            packet_limit=wire.packet_limit(config.max_payload_bytes),
            will=self._will(),
        )
        try:
            self._transport.open(self._reach(url, limit), request)
            # A broker that does not answer MQTT 5 must leave time for the other version.
            connack, events = self._await_connack(limit if last else limit.share(2))
        except TLSAlertError as error:
            from tars_mqtt._core.tls import failure_of

            raise failure_of(error.error, url, config) from error.error
        except (ConnectionLostError, wire.MalformedPacketError) as error:
            reason = str(error)
            if url.scheme == "mqtt" and not isinstance(error, NoConnackError):
                reason += "; write mqtts:// if that is a port for TLS"
            if config.protocol == "auto" and url not in self._spoken:
                raise VersionRefusedError(reason) from None
            raise ConnectionLostError(reason) from None
        _check(connack, url)
        return Connection(url=url, version=version, connack=connack, events=events)

    def _reach(self, url: BrokerURL, limit: Limit) -> Any:
        """A socket, or what can stand in for one, on which the broker expects CONNECT."""
        sock: Any
        if self._proxy is None or url.transport == "unix":
            sock = dial(url, limit)
        else:
            from tars_mqtt._core.proxy import dial_through

            sock = dial_through(self._proxy, url, limit)
        if url.tls:
            from tars_mqtt._core.tls import secure

            sock = secure(sock, url, self._config, limit)
        if url.transport == "websockets":
            from tars_mqtt._core.websocket import upgrade

            sock = upgrade(sock, url, self._secrets.headers, limit)
        return sock

    def _await_connack(self, limit: Limit) -> tuple[Connack, list[Event]]:
        while True:
            self._transport.acknowledge_wake()
            remaining = limit.left()
            if remaining <= 0:
                raise NoConnackError("the broker did not answer CONNECT in time")
            match self._transport.poll(remaining, more=False):
                case [Connack() as connack, *rest]:
                    return connack, rest
                case [Disconnect(_, reason), *_]:
                    raise NoConnackError(f"the broker ended the connection: {reason}")
                case [_, *_]:
                    raise NoConnackError("the broker did not begin with CONNACK [MQTT-3.2.0-1]")


def _check(connack: Connack, url: BrokerURL) -> None:
    if connack.code in _UNSUPPORTED_VERSION:
        raise VersionRefusedError(f"the broker at {url} does not speak this version of MQTT")
    if connack.code:
        retriable = connack.code in _RETRIABLE
        raise ConnectRefusedError(
            f"the broker at {url} refused the connection: {connack.reason}"
            + ("" if retriable else "; check client_id, username, password and the broker's rules"),
            reason=connack.reason,
            code=connack.code,
            retriable=retriable,
        )


def _import_needed(config: MQTTClientConfig) -> None:
    """Import what not all connections need, and takes a tenth of the time to import all the rest.

    On the thread that makes the client: a fork in the middle of an import would leave the child with half a module.
    """
    if any(url.tls for url in config.urls):
        import tars_mqtt._core.tls
    if any(url.transport == "websockets" for url in config.urls):
        import tars_mqtt._core.websocket
    if config.proxy:
        import tars_mqtt._core.proxy  # noqa: F401 - as those above
