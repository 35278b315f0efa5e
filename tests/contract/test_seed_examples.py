"""The examples of the original README, word for word: only the import line differs, and the broker's address.

They are in ``seed_examples.txt``. What an example takes for granted (a connected ``client``, ``handler``,
imports) is given to it. Where publishing and subscribing are shown, the blocking form runs too: the same text
without ``async`` and ``await``.
"""

from __future__ import annotations

import ast
import asyncio
import functools
import json
import logging
import re
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import attrs
import pytest

from tests.support import eventually
from tests.support.colour import LoopThread
from tests.support.example import Example, examples_in, run_block, shut_down_clients
from tests.support.observer import Observer

if TYPE_CHECKING:
    from collections.abc import Iterator

OLD_IMPORT = "from tars.adapters.mqtt_client import MQTTClient"
NEW_IMPORT = {"aio": "from tars_mqtt.aio import MQTTClient", "sync": "from tars_mqtt import MQTTClient"}
EXAMPLES = examples_in(Path(__file__).with_name("seed_examples.txt"))

both = pytest.mark.parametrize("colour", ["aio", "sync"])
asyncio_only = pytest.mark.parametrize("colour", ["aio"])


def example(heading: str, number: int = 0) -> Example:
    """The example under *heading*; *number* counts those under the same heading."""
    return [example for example in EXAMPLES if example.heading == heading][number]


class Reader:
    """Somebody who copies the examples into a service."""

    def __init__(self, colour: str, broker: Any) -> None:
        self._colour = colour
        self._address = f"{broker.host}:{broker.port}"
        self._loop = LoopThread()
        self.logged: list[str] = []
        self.names: dict[str, Any] = {
            "__name__": "__main__",
            "Any": Any,
            "Callable": Callable,
            "Optional": Optional,
            "asyncio": asyncio,
            "json": json,
            "logger": types.SimpleNamespace(error=self.logged.append),
            "orjson": types.SimpleNamespace(loads=json.loads, dumps=lambda data: json.dumps(data).encode()),
            "time": time,
        }

    def run(self, what: Example | str) -> None:
        """Run an example, or code of the test's own."""
        if isinstance(what, str):
            what = Example(page=Path(__file__), line=1, heading="", code=what)
        code = what.at(self._address).code.replace(OLD_IMPORT, NEW_IMPORT[self._colour])
        if self._colour == "sync":
            code = re.sub(r"\b(async|await) ", "", code)
        block = functools.partial(run_block, attrs.evolve(what, code=code), self.names)
        if self._colour == "aio":
            self._loop.call(block)
        else:
            asyncio.run(block())

    def connect(self) -> None:
        """Have a connected ``client``, as most of the examples take for granted."""
        self.run(OLD_IMPORT)
        self.run("client = MQTTClient('mqtt://localhost:1883', 'my-service', enable_health=True)")
        self.run("await client.connect()")

    def close(self) -> None:
        self._loop.call(shut_down_clients)
        self._loop.close()


@pytest.fixture
def reader(colour, broker, monkeypatch) -> Iterator[Reader]:
    monkeypatch.setenv("MQTT_URL", broker.url)
    monkeypatch.setenv("MQTT_CLIENT_ID", "my-service")
    reader = Reader(colour, broker)
    yield reader
    reader.close()


@pytest.fixture
def observer(broker) -> Iterator[Observer]:
    with Observer(broker.host, broker.port) as observer:
        yield observer


@pytest.fixture
def printed(capsys) -> Callable[[], str]:
    """Gives a function that returns what was printed so far."""
    text: list[str] = []

    def so_far() -> str:
        text.append(capsys.readouterr().out)
        return "".join(text)

    return so_far


def envelope(source: str = "another-service", **data: Any) -> dict[str, Any]:
    return {"id": "0" * 32, "type": "some.event", "ts": time.time(), "source": source, "data": data}


def test_every_example_is_here():
    """None is left out: each has its test below."""
    assert [example.heading for example in EXAMPLES] == [
        "Minimal Example (7 LOC)",
        "Advanced: Context Manager",
        "Advanced: Direct Instantiation",
        "Basic Event",
        "With Correlation ID",
        "With QoS and Retain",
        "Pydantic Models",
        "Publish Health",
        "Basic Subscription",
        "Wildcard Subscriptions",
        "Error Handling in Handlers",
        "Message Envelope Structure",
        "Migration from Legacy MQTT Code",
        "Migration from Legacy MQTT Code",
        "Pattern 1: Domain-Specific Wrapper",
        "Pattern 2: Message Batching",
        "Pattern 3: Direct Client Access",
    ]


# -- quick start ----------------------------------------------------------------------------------


@both
def test_minimal_example(reader, observer, broker):
    """Connects from the environment, publishes, subscribes, shuts down."""
    reader.run(example("Minimal Example (7 LOC)"))
    (event,) = observer.wait_for("my/topic")
    assert event.envelope["type"] == "my.event.type"
    assert event.data == {"message": "Hello TARS!"}
    assert event.envelope["source"] == "my-service"
    assert "incoming/topic (QoS 0)" in broker.log
    eventually(lambda: "Received DISCONNECT from my-service" in broker.log)


@asyncio_only
def test_context_manager(reader, observer, broker, printed):
    """Connects on enter, serves, and shuts down when its task is cancelled."""
    reader.run(example("Advanced: Context Manager"))
    reader.run("task = asyncio.create_task(main())")
    (event,) = observer.wait_for("status")
    assert (event.envelope["type"], event.data) == ("service.ready", {})
    eventually(lambda: "commands/# (QoS 0)" in broker.log)
    observer.publish("commands/go", b"now")
    eventually(lambda: "Got: b'now'" in printed())
    reader.run("task.cancel()\nawait asyncio.wait([task])")
    eventually(lambda: "Received DISCONNECT from my-service" in broker.log)


@both
def test_direct_instantiation(reader, observer):
    """All the settings of the original are taken, and health and heartbeat work."""
    reader.run(example("Advanced: Direct Instantiation"))
    ready, gone = observer.wait_for("system/health/my-service", 2)
    assert (ready.data["ok"], ready.data["event"]) == (True, "ready")
    assert (gone.data["ok"], gone.data["event"]) == (False, "shutdown")
    assert gone.retain
    assert reader.names["client"].config.heartbeat_interval == 30.0


# -- publishing -----------------------------------------------------------------------------------


@both
def test_basic_event(reader, observer):
    """An event arrives as an envelope."""
    reader.connect()
    reader.run(example("Basic Event"))
    (event,) = observer.wait_for("events/user/login")
    assert event.envelope["type"] == "user.login"
    assert event.data["user_id"] == "123"
    assert isinstance(event.data["timestamp"], float)


@both
def test_with_correlation_id(reader, observer):
    """A correlation id travels beside the id, not in its place."""
    reader.connect()
    reader.run(example("With Correlation ID"))
    (event,) = observer.wait_for("llm/response")
    assert event.envelope["correlation_id"] == "request-456"
    assert re.fullmatch("[0-9a-f]{32}", event.envelope["id"])


@both
def test_with_qos_and_retain(reader, observer, broker):
    """QoS and the retain flag reach the broker, which keeps the event for new subscribers."""
    reader.connect()
    reader.run(example("With QoS and Retain"))
    (event,) = observer.wait_for("config/update")
    assert (event.data, event.qos, event.retain) == ({"key": "value"}, 1, True)
    with Observer(broker.host, broker.port) as latecomer:
        assert latecomer.wait_for("config/update")[0].payload == event.payload


@both
def test_pydantic_models(reader, observer):
    """A pydantic model is the data."""
    reader.connect()
    reader.run(example("Pydantic Models"))
    (event,) = observer.wait_for("events/user")
    assert event.data == {"user_id": "123", "action": "login"}


@both
def test_publish_health(reader, observer):
    """The service's own word on its health: enveloped, QoS 1, retained."""
    reader.connect()
    reader.run(example("Publish Health"))
    ready, good, bad = observer.wait_for("system/health/my-service", 3)
    assert good.data.keys() == {"ok", "event", "timestamp"}
    assert (good.data["ok"], good.data["event"]) == (True, "startup_complete")
    assert bad.data.keys() == {"ok", "error", "timestamp"}
    assert (bad.data["ok"], bad.data["error"]) == (False, "database_connection_failed")
    assert {(seen.qos, seen.retain, seen.envelope["type"]) for seen in (ready, good, bad)} == {
        (1, True, "health.status")
    }


# -- subscribing ----------------------------------------------------------------------------------


@both
def test_basic_subscription(reader, observer, printed):
    """A handler without options is given the payload."""
    reader.connect()
    reader.run(example("Basic Subscription"))
    observer.publish("stt/final", envelope(text="hello world"))
    eventually(lambda: "Transcription: hello world\n" in printed())


@both
def test_wildcard_subscriptions(reader, observer, printed):
    """+ is one level, # is any number of them."""
    reader.connect()
    reader.run(example("Wildcard Subscriptions"))
    observer.publish("system/health/camera", envelope("camera", ok=False))
    observer.publish("system/health/a/b", envelope("two levels", ok=True))
    observer.publish("events/a/b/c", envelope())
    eventually(lambda: "Event: some.event\n" in printed())
    eventually(lambda: "camera: unhealthy\n" in printed())
    assert "my-service: healthy\n" in printed()
    assert "two levels" not in printed()


@both
def test_error_handling_in_handlers(reader, observer):
    """A handler that deals with its errors goes on with the next message."""
    reader.connect()
    reader.run(example("Error Handling in Handlers"))
    observer.publish("topic", b"no JSON")
    observer.publish("topic", envelope())
    eventually(lambda: reader.names["client"].stats().handled == 2)
    assert len(reader.logged) == 1
    assert reader.logged[0].startswith("Handler error: ")
    assert reader.names["client"].stats().handler_failures == 0


@both
def test_what_the_comment_promises_holds_without_the_try(reader, observer, caplog):
    """Error is logged but doesn't crash dispatch loop: true of handlers that deal with nothing, too."""
    reader.connect()
    reader.run("async def careless(payload: bytes) -> None:\n    orjson.loads(payload)\n")
    reader.run("await client.subscribe('topic', careless)")
    with caplog.at_level(logging.ERROR, "tars_mqtt.dispatch"):
        observer.publish("topic", b"no JSON")
        observer.publish("topic", envelope())
        eventually(lambda: reader.names["client"].stats().handled == 1)
    assert reader.names["client"].stats().handler_failures == 1
    assert "handler careless failed on a message of 'topic'" in caplog.text


# -- the envelope ---------------------------------------------------------------------------------


@both
def test_message_envelope_structure(reader, observer):
    """What is sent has the documented keys, in the documented order, with values of the documented types."""
    documented = ast.literal_eval(example("Message Envelope Structure").code)
    reader.connect()
    reader.run(f"await client.publish_event('a', 'event.type', {documented['data']!r})")
    (event,) = observer.wait_for("a")
    assert list(event.envelope) == list(documented)
    assert list(map(type, event.envelope.values())) == list(map(type, documented.values()))
    assert event.data == documented["data"]


# -- migration ------------------------------------------------------------------------------------


def test_the_legacy_pattern_never_ran():
    """The one example that is not run, since it is not Python: a loop without a body is its last line."""
    with pytest.raises(SyntaxError):
        ast.parse(example("Migration from Legacy MQTT Code", 0).code)


@both
def test_the_centralized_client(reader, observer, broker):
    """Five lines in place of the legacy pattern."""
    reader.run(OLD_IMPORT)
    reader.run("async def handler(payload: bytes) -> None: ...")
    reader.run(example("Migration from Legacy MQTT Code", 1))
    (event,) = observer.wait_for("topic")
    assert (event.envelope["type"], event.data) == ("my.event", {"key": "value"})
    assert "topic (QoS 0)" in broker.log


# -- extension patterns ---------------------------------------------------------------------------


@both
def test_domain_specific_wrapper(reader, observer):
    """A wrapper speaks the words of its domain."""
    reader.run(OLD_IMPORT)
    reader.run(example("Pattern 1: Domain-Specific Wrapper"))
    (event,) = observer.wait_for("stt/final")
    assert event.envelope["type"] == "stt.final"
    assert event.envelope["source"] == "stt-worker"
    assert event.data["text"] == "hello world"
    assert event.data["confidence"] == 0.95
    assert event.data["is_final"] is True
    assert event.qos == 1


@asyncio_only
def test_message_batching(reader, observer):
    """Batches go out when they are full.

    The example leaves out ``_flush_loop``, without which its ``connect`` cannot run; the test adds one
    between the class and its use.
    """
    whole = example("Pattern 2: Message Batching")
    before, usage = whole.code.split("# Usage\n")
    reader.run(OLD_IMPORT)
    reader.run(attrs.evolve(whole, code=before))
    reader.run("async def _flush_loop(self): await asyncio.Event().wait()")
    reader.run("BatchingMQTTClient._flush_loop = _flush_loop")
    reader.run("sensor_readings = [{'celsius': n} for n in range(120)]")
    reader.run(attrs.evolve(whole, code=usage))
    first, second = observer.wait_for("sensors/temperature/batch", 2)
    assert first.envelope["type"] == "sensors/temperature.batch"
    assert (first.data["count"], second.data["count"]) == (50, 50)
    items = first.data["items"] + second.data["items"]
    assert [item["celsius"] for item in items] == list(range(100))


@asyncio_only
def test_direct_client_access(reader, observer):
    """The client underneath is subscribed on and iterated over, and messages are filtered by hand."""
    reader.run(OLD_IMPORT)
    reader.run("arrived = []\nasync def handler(payload): arrived.append(payload)")
    reader.run(example("Pattern 3: Direct Client Access"))
    observer.publish("sensors/kitchen/humidity", b"60")
    observer.publish("sensors/kitchen/temperature", b"21.5")
    eventually(lambda: reader.names["arrived"] == [b"21.5"])
