"""What both clients refuse on the caller's line, without a broker."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest

import tars_mqtt
from tars_mqtt import MQTTClientConfig, TopicError, aio

URL = "mqtt://localhost:1"

both = pytest.mark.parametrize("client_class", [tars_mqtt.MQTTClient, aio.MQTTClient], ids=["sync", "aio"])


def outcome(call: Any) -> Any:
    """Await what the asyncio client returns."""

    async def wait() -> Any:
        return await call

    return asyncio.run(wait()) if inspect.iscoroutine(call) else call


@both
def test_a_misspelt_setting_is_pointed_out(client_class, monkeypatch) -> None:
    """However the settings come in, the error says which one was probably meant."""
    monkeypatch.setenv("MQTT_URL", URL)
    monkeypatch.setenv("MQTT_CLIENT_ID", "c")
    with pytest.raises(TypeError, match="'keep_alive': did you mean 'keepalive'"):
        client_class(URL, "c", keep_alive=60)
    with pytest.raises(TypeError, match="'keep_alive': did you mean 'keepalive'"):
        client_class.from_env(keep_alive=60)


@both
def test_a_decorator_without_a_filter_is_refused(client_class) -> None:
    """``@client.on`` in place of ``@client.on("a")`` must not be a handler that nobody ever calls."""

    def handler(payload: bytes) -> None: ...

    client = client_class(URL, "c")
    with pytest.raises(TopicError, match="must be a str, not function"):
        client.on(handler)
    with pytest.raises(TopicError, match="'#'"):
        client.on("a/#/b")


@both
@pytest.mark.parametrize("retain", ["false", "yes", None, 2])
def test_retain_is_a_boolean(client_class, retain: Any) -> None:
    """The text "false" counts as true in Python: retained by mistake, a message stays at the broker for good."""
    client = client_class(URL, "c")
    for qos in (0, 1):
        with pytest.raises(ValueError, match="retain must be True or False"):
            outcome(client.publish("a", "b", qos=qos, retain=retain))
        with pytest.raises(ValueError, match="retain must be True or False"):
            outcome(client.publish_event("a", "b", {}, qos=qos, retain=retain))


@both
def test_a_payload_that_is_no_bytes_is_refused_with_the_way_out(client_class) -> None:
    client = client_class(URL, "c")
    with pytest.raises(TypeError, match="not dict: publish_event takes"):
        outcome(client.publish("a", {"celsius": 21}))


def test_the_settings_keep_their_signature() -> None:
    """Editors, type checkers and ``help()`` see every setting by name."""
    parameters = inspect.signature(MQTTClientConfig).parameters
    assert {"mqtt_url", "client_id", "keepalive"} <= parameters.keys()
    assert parameters["keepalive"].annotation in (int, "int")
