"""The settings as keywords, so that editors complete them and type checkers find a wrong one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict

_Path = str | os.PathLike[str]


class Settings(TypedDict, total=False):
    """The fields of `MQTTClientConfig`, which says what they mean and checks them, but for the first three."""

    enable_health: bool
    enable_heartbeat: bool
    heartbeat_interval: float
    dedupe_ttl: float
    dedupe_max_entries: int
    keepalive: int
    reconnect_min_delay: float
    reconnect_max_delay: float
    connect_timeout: float
    publish_timeout: float
    shutdown_timeout: float
    handler_timeout: float
    protocol: Literal["auto", "5", "3.1.1"]
    session_expiry: float
    drain_shared: bool
    workers: int
    max_inflight: int
    max_queued: int
    max_queued_bytes: int
    max_pending: int
    max_payload_bytes: int
    outbox: _Path | None
    outbox_max_messages: int
    outbox_max_bytes: int
    outbox_max_age: float
    dedupe_durable: bool
    correlation: Literal["field", "id"]
    username: str | None
    password: str | None
    password_file: _Path | None
    credentials: Callable[[], Any] | None
    ws_headers: Mapping[str, str] | Callable[[], Any] | str | None
    proxy: str | None
    tls_ca: _Path | None
    tls_cert: _Path | None
    tls_key: _Path | None
    tls_key_password_file: _Path | None
    tls_insecure: bool


class Overrides(Settings, total=False):
    """All fields of `MQTTClientConfig`."""

    mqtt_url: str
    client_id: str
    source_name: str | None
