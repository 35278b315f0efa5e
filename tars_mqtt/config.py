"""The settings of a client: one frozen value, checked as a whole, from keywords or from the environment."""

from __future__ import annotations

import logging
import math
import os
import reprlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache, cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeAlias, TypeVar, Unpack

import attrs

from tars_mqtt import rule
from tars_mqtt.errors import ConfigError
from tars_mqtt.settings import Overrides
from tars_mqtt.topics import MAX_STRING_BYTES
from tars_mqtt.url import BrokerURL, parse_proxy, parse_urls

if TYPE_CHECKING:
    from cattrs import Converter

__all__ = ["MQTTClientConfig"]

logger = logging.getLogger(__name__)

_Path: TypeAlias = str | os.PathLike[str]
_ConfigT = TypeVar("_ConfigT", bound=attrs.AttrsInstance)

_BOOLEANS: Final = {
    **dict.fromkeys(("true", "1", "yes", "on"), True),
    **dict.fromkeys(("false", "0", "no", "off"), False),
}


@cache
def _converter() -> Converter:
    from cattrs import Converter  # late: it takes longer to import than all of this package

    converter = Converter()
    converter.register_structure_hook(bool, lambda text, _: _BOOLEANS[text.strip().lower()])
    return converter


def _as_float(value: Any) -> Any:
    try:
        return float(value) if rule.is_int(value) else value
    except OverflowError:
        return math.inf


def _or_empty(name: str | None) -> str:
    return "" if name is None else name


def _redacted(urls: str) -> str:
    try:
        return repr(",".join(url.redacted for url in parse_urls(urls)))
    except ValueError:  # a traceback that shows local variables may ask before the checks are through
        return "<malformed>"


def _redacted_proxy(url: str | None) -> str:
    try:
        return repr(url and parse_proxy(url).redacted)
    except ValueError:
        return "<malformed>"


def _as_headers(value: Any) -> Any:
    """Read ``Name: value``, several of it separated by line breaks, or without those by commas."""
    if isinstance(value, Mapping):
        return dict(value)
    if not isinstance(value, str):
        return value
    pairs = [
        line.partition(":")
        for line in (value.splitlines() if "\n" in value else value.split(","))
        if line.strip()
    ]
    if not all(colon for _, colon, _ in pairs):
        return value
    return {name.strip(): text.strip() for name, _, text in pairs}


def _about(variable: str | None, check: rule.Rule, doc: str) -> dict[str, Any]:
    """A field's metadata: its environment variable without the prefix, its rule, and a line for the docs."""
    return {"env": variable, "rule": check, "doc": doc}


def _setting(default: object, variable: str, check: rule.Rule, doc: str, *, secret: bool = False) -> Any:
    return attrs.field(
        default=default,
        kw_only=True,
        converter=_as_float if isinstance(default, float) else None,
        repr=not secret,
        metadata=_about(variable, check, doc),
    )


def _flag(variable: str, doc: str) -> Any:
    return attrs.field(default=False, kw_only=True, metadata=_about(variable, rule.boolean, doc))


def _knowing_its_names(cls: type[_ConfigT]) -> type[_ConfigT]:
    """Have a class of settings say which of them a misspelt keyword was probably meant to be."""
    init: Callable[..., None] = vars(cls)["__init__"]

    @wraps(init)
    def __init__(self: object, *args: Any, **settings: Any) -> None:  # noqa: N807
        known = [field.name for field in attrs.fields(cls)]
        if unknown := [name for name in settings if name not in known]:
            raise TypeError("; ".join(_no_such_setting(name, known) for name in unknown))
        init(self, *args, **settings)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


_ELSEWHERE: Final = {
    **dict.fromkeys(("host", "hostname", "broker", "server", "port"), ("mqtt_url", "URL")),
    **dict.fromkeys(("ca_certs", "cafile", "ca"), ("tls_ca", "TLS_CA")),
    **dict.fromkeys(("clean_session", "clean_start"), ("session_expiry", "SESSION_EXPIRY")),
    "certfile": ("tls_cert", "TLS_CERT"),
    "keyfile": ("tls_key", "TLS_KEY"),
    "identifier": ("client_id", "CLIENT_ID"),
    "will": ("enable_health", "ENABLE_HEALTH"),
}
"""What other clients call it, and what that is here, as a keyword and as a variable."""


def _no_such_setting(name: str, known: Collection[str]) -> str:
    meant = _meant(name.lower(), known)
    hint = f"did you mean {meant!r}?" if meant else f"choose from {', '.join(known)}"
    return f"there is no setting {name!r}: {hint}"


def _meant(name: str, known: Iterable[str]) -> str | None:
    """The one of *known* that a wrong name is most like, or else the shortest of which it is a part."""
    import difflib  # late: names are right, as a rule

    if (ours := _ELSEWHERE.get(name.lower())) is not None:
        return next((one for one in known if one in ours), None)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    longer = sorted((one for one in known if name and name in one), key=len)
    return next(iter(close + longer), None)


@_knowing_its_names
@attrs.frozen
class MQTTClientConfig:
    """All settings of a client; `attrs.evolve` makes a changed copy.

    Durations are in seconds. ``attrs.fields(MQTTClientConfig)`` lists the settings; the metadata of each has
    its environment variable without the prefix (``env``, None where there is none) and its description (``doc``).

    Raises:
        ConfigError: One or more settings are wrong; it names them all.
        TypeError: There is no setting of that name; it says which was probably meant.
    """

    mqtt_url: str = attrs.field(
        repr=_redacted, metadata=_about("URL", rule.url, "The broker, or several by commas, tried in turn")
    )
    client_id: str = attrs.field(
        metadata=_about("CLIENT_ID", rule.client_id, "Our name, unique at the broker")
    )
    source_name: str = attrs.field(
        default=None,
        converter=_or_empty,
        metadata=_about(
            "SOURCE_NAME", rule.source_name, "Our name in envelopes and topics, else the client_id"
        ),
    )
    enable_health: bool = _flag("ENABLE_HEALTH", "Publish a retained health status")
    enable_heartbeat: bool = _flag("ENABLE_HEARTBEAT", "Publish a heartbeat")
    heartbeat_interval: float = _setting(
        30.0, "HEARTBEAT_INTERVAL", rule.seconds(1.0), "Between two heartbeats"
    )
    dedupe_ttl: float = _setting(
        0.0, "DEDUPE_TTL", rule.seconds(0.0, math.inf), "How long an envelope id is remembered; 0 is off"
    )
    dedupe_max_entries: int = _setting(
        0,
        "DEDUPE_MAX_ENTRIES",
        rule.whole(0),
        "How many envelope ids are remembered; above 0 if dedupe_ttl is",
    )
    keepalive: int = _setting(
        60, "KEEPALIVE", rule.whole(1, 65_535), "Longest silence before the peer is probed"
    )
    reconnect_min_delay: float = _setting(
        1.0, "RECONNECT_MIN_DELAY", rule.seconds(0.1), "Ceiling of an outage's first, random delay"
    )
    reconnect_max_delay: float = _setting(60.0, "RECONNECT_MAX_DELAY", rule.seconds(0.5), "Longest delay")
    connect_timeout: float = _setting(10.0, "CONNECT_TIMEOUT", rule.timeout, "How long connecting may take")
    publish_timeout: float = _setting(
        30.0, "PUBLISH_TIMEOUT", rule.timeout, "How long a publish waits for its ack"
    )
    shutdown_timeout: float = _setting(10.0, "SHUTDOWN_TIMEOUT", rule.timeout, "How long a shutdown may take")
    handler_timeout: float = _setting(
        0.0,
        "HANDLER_TIMEOUT",
        rule.seconds(0.0),
        "After which a handler that does not return failed; 0 is off",
    )
    protocol: Literal["auto", "5", "3.1.1"] = _setting(
        "auto", "PROTOCOL", rule.one_of("auto", "5", "3.1.1"), "5, 3.1.1, or auto: 5 where the broker has it"
    )
    session_expiry: float = _setting(
        3600.0,
        "SESSION_EXPIRY",
        rule.seconds(0.0, 4_294_967_295.0, whole=True),
        "How long the broker keeps our session while we are away; 0 is a clean session",
    )
    drain_shared: bool = _flag(
        "DRAIN_SHARED", "A shutdown leaves shared subscriptions first, and handles what they have brought"
    )
    workers: int = _setting(8, "WORKERS", rule.whole(1, 1000), "Threads that run handlers")
    max_inflight: int = _setting(
        64, "MAX_INFLIGHT", rule.whole(1, 65_535), "QoS 1/2 messages sent without ack"
    )
    max_queued: int = _setting(10_000, "MAX_QUEUED", rule.whole(1), "Outgoing messages held")
    max_queued_bytes: int = _setting(
        2**26, "MAX_QUEUED_BYTES", rule.whole(1), "Bytes of outgoing messages held"
    )
    max_pending: int = _setting(
        10_000, "MAX_PENDING", rule.whole(1), "Incoming messages waiting for handlers"
    )
    max_payload_bytes: int = _setting(
        2**26,
        "MAX_PAYLOAD_BYTES",
        rule.whole(1, 268_435_455),
        "Bytes of an incoming message; a larger one is dropped",
    )
    outbox: _Path | None = attrs.field(
        default=None,
        kw_only=True,
        metadata=_about("OUTBOX", rule.path, "A file that keeps QoS 1/2 messages until the broker has them"),
    )
    outbox_max_messages: int = _setting(
        1_000_000, "OUTBOX_MAX_MESSAGES", rule.whole(1), "Messages kept in the outbox, instead of max_queued"
    )
    outbox_max_bytes: int = _setting(
        2**30, "OUTBOX_MAX_BYTES", rule.whole(1), "Their bytes, instead of max_queued_bytes"
    )
    outbox_max_age: float = _setting(
        0.0, "OUTBOX_MAX_AGE", rule.seconds(0.0, math.inf), "After which a message is given up; 0 is never"
    )
    dedupe_durable: bool = _flag(
        "DEDUPE_DURABLE", "Remember envelope ids in the outbox file, across restarts"
    )
    correlation: Literal["field", "id"] = _setting(
        "field", "CORRELATION", rule.one_of("field", "id"), "Where correlation ids go; id is the old form"
    )
    username: str | None = _setting(None, "USERNAME", rule.username, "Instead of the URL's user name")
    password: str | None = _setting(
        None, "PASSWORD", rule.password, "Instead of the URL's password", secret=True
    )
    password_file: _Path | None = attrs.field(
        default=None,
        kw_only=True,
        metadata=_about(
            "PASSWORD_FILE", rule.path, "File with the password, read at each connection attempt"
        ),
    )
    credentials: Callable[[], Any] | None = attrs.field(
        default=None,
        kw_only=True,
        repr=False,
        metadata=_about(None, rule.function, "Gives user name and password, called at each attempt"),
    )
    ws_headers: Mapping[str, str] | Callable[[], Any] | str | None = attrs.field(
        default=None,
        kw_only=True,
        converter=_as_headers,
        repr=False,
        hash=False,
        metadata=_about("WS_HEADERS", rule.headers, "Headers of the websocket handshake"),
    )
    proxy: str | None = attrs.field(
        default=None,
        kw_only=True,
        repr=_redacted_proxy,
        metadata=_about("PROXY", rule.proxy, "A SOCKS or HTTP proxy, socks5://host:port or http://host:port"),
    )
    tls_ca: _Path | None = attrs.field(
        default=None,
        kw_only=True,
        metadata=_about("TLS_CA", rule.path, "PEM file of the CAs, not the system's"),
    )
    tls_cert: _Path | None = attrs.field(
        default=None, kw_only=True, metadata=_about("TLS_CERT", rule.path, "PEM file of our certificate")
    )
    tls_key: _Path | None = attrs.field(
        default=None, kw_only=True, metadata=_about("TLS_KEY", rule.path, "PEM file of our certificate's key")
    )
    tls_key_password_file: _Path | None = attrs.field(
        default=None,
        kw_only=True,
        metadata=_about("TLS_KEY_PASSWORD_FILE", rule.path, "A file with the password of tls_key"),
    )
    tls_insecure: bool = _flag("TLS_INSECURE", "Trust any certificate, an impostor's too")

    def __attrs_post_init__(self) -> None:
        if self.source_name == "":
            object.__setattr__(self, "source_name", self.client_id)
        if problems := _problems(self):
            raise ConfigError(problems)

    @classmethod
    def from_env(
        cls, prefix: str = "MQTT_", environ: Mapping[str, str] | None = None, **overrides: Unpack[Overrides]
    ) -> Self:
        """Read the settings from environment variables; an empty variable is an unset one.

        Args:
            prefix: What the names of the variables begin with.
            environ: Where to look instead of `os.environ`.
            overrides: Settings by field name, which win over the environment.

        Raises:
            ConfigError: One or more settings are wrong; it names them all, with their variables.
        """
        environ = os.environ if environ is None else environ
        fields = [field for field in attrs.fields(cls) if field.metadata["env"]]
        variables = {field.name: prefix + field.metadata["env"] for field in fields}
        _warn_of_misspellings(environ, prefix, variables.values())
        values: dict[str, Any] = {"mqtt_url": None, "client_id": None}
        for field in fields:
            if raw := environ.get(variables[field.name]):
                values[field.name] = _structured(raw, type(field.default))
        values.update(overrides)
        try:
            return cls(**values)
        except ConfigError as error:
            problems = [problem.split(" ", 1) for problem in error.problems]
        variables |= dict.fromkeys(overrides, "given by keyword")
        raise ConfigError([f"{name} ({variables[name]}) {problem}" for name, problem in problems])

    @cached_property
    def urls(self) -> tuple[BrokerURL, ...]:
        """The brokers of `mqtt_url`, in the order in which they are tried."""
        return parse_urls(self.mqtt_url)

    def user_and_password(self, url: BrokerURL | None = None) -> tuple[str | None, str | None]:
        """User name and password for *url*, the first of `urls` if None, as the settings have them.

        Does not ask `credentials`, where those are set: each attempt to connect does.

        Reads ``password_file`` each time: whoever changes the password need not restart the service.

        Raises:
            ConfigError: The file cannot be read, or what it holds is no password.
        """
        url = self.urls[0] if url is None else url
        username = url.username if self.username is None else self.username
        if self.password_file is not None:
            return username, _read_password(Path(self.password_file))
        return username, url.password if self.password is None else self.password


def _problems(config: MQTTClientConfig) -> list[str]:
    """One sentence per wrong field; each begins with the name of the field."""
    fields = attrs.fields(type(config))
    found: dict[str, str] = {}
    for field in fields:
        value = getattr(config, field.name)
        if problem := field.metadata["rule"](value):
            quotable = field.repr is True and value is not None
            found[field.name] = f"{problem} (got {reprlib.repr(value)})" if quotable else problem
    if "client_id" in found and config.source_name is config.client_id:
        found.pop("source_name", None)
    conflicts = dict(_conflicts(config, found))
    if "mqtt_url" not in found:
        conflicts |= _url_conflicts(config)
    found = conflicts | found
    return [f"{field.name} {found[field.name]}" for field in fields if field.name in found]


def _conflicts(config: MQTTClientConfig, found: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What is wrong with a field because of another; fields already *found* wrong are not compared."""
    sound = found.keys().isdisjoint
    ttl, entries = config.dedupe_ttl, config.dedupe_max_entries
    if sound(("dedupe_ttl", "dedupe_max_entries")) and ttl > 0 and entries == 0:
        yield "dedupe_max_entries", "must be above 0 when dedupe_ttl is"
    low, high = config.reconnect_min_delay, config.reconnect_max_delay
    if sound(("reconnect_min_delay", "reconnect_max_delay")) and high < low:
        yield "reconnect_max_delay", f"must not be below reconnect_min_delay (got {high} and {low})"
    if config.password is not None and config.password_file is not None:
        yield "password_file", "and password are both set: keep one of them"
    for name in ("username", "password", "password_file"):
        if config.credentials is not None and getattr(config, name) is not None:
            yield name, "and credentials are both set: keep one of them"
    if config.dedupe_durable is True and (config.outbox is None or not config.dedupe_ttl):
        yield "dedupe_durable", "needs outbox and dedupe_ttl: set both, or leave it off"
    if (config.tls_cert is None) != (config.tls_key is None):
        missing = "tls_cert" if config.tls_cert is None else "tls_key"
        yield missing, "is missing: tls_cert and tls_key go together"


def _url_conflicts(config: MQTTClientConfig) -> Iterator[tuple[str, str]]:
    if config.ws_headers and not any(url.transport == "websockets" for url in config.urls):
        yield "ws_headers", "is for websockets: write ws:// or wss:// in mqtt_url, or remove it"
    if config.proxy and all(url.transport == "unix" for url in config.urls):
        yield "proxy", "has no use for a Unix socket: remove it"
    if not any(url.tls for url in config.urls):
        for name in ("tls_ca", "tls_cert", "tls_key", "tls_key_password_file", "tls_insecure"):
            if getattr(config, name) not in (None, False):
                yield name, "is for TLS: write mqtts:// or wss:// in mqtt_url, or remove it"
    # [MQTT-3.1.2-22] of 3.1.1
    if config.username is None and config.credentials is None and config.protocol != "5":
        ours = config.password is not None or config.password_file is not None
        if any(url.username is None and (ours or url.password is not None) for url in config.urls):
            yield "username", "is required with a password, unless protocol is '5'"


def _structured(raw: str, wanted: type) -> Any:
    """A number or a boolean as such; what is neither stays a str, and the field's rule says so."""
    if wanted not in (bool, int, float):
        return raw
    try:
        return _converter().structure(raw, wanted)
    except (KeyError, ValueError):
        return raw


def _warn_of_misspellings(environ: Mapping[str, str], prefix: str, known: Collection[str]) -> None:
    suffixes = [name.removeprefix(prefix) for name in known]  # the prefix would make all look alike
    for name in environ:
        if not name.startswith(prefix) or name in known:
            continue
        suffix = name.removeprefix(prefix)
        if suffix.removeprefix("_") in suffixes:
            logger.warning("ignored the environment variable %s: is the prefix %r?", name, prefix + "_")
        elif meant := _meant(suffix, suffixes):
            logger.warning("ignored the environment variable %s: did you mean %s?", name, prefix + meant)


def _read_password(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_STRING_BYTES + 3)  # room for the end of the line, and one byte too many
    except OSError as error:
        raise ConfigError([f"password_file {str(path)!r} cannot be read: {error.strerror}"]) from error
    data = data.removesuffix(b"\n").removesuffix(b"\r")
    password = data.decode(errors="replace")  # strict, the error would carry the password
    problem = rule.password(password) if data else "must not be empty"
    if not problem and password.encode() != data:
        problem = "must be UTF-8"
    if problem:
        raise ConfigError([f"password_file {str(path)!r}: its content {problem}"])
    return password
