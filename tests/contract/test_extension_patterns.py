"""docs/examples/custom_mqtt_wrapper.py works as a program, and its patterns keep what they promise."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import eventually
from tests.support.example import package_directory
from tests.support.observer import Observer

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "custom_mqtt_wrapper.py"


@pytest.fixture
def observer(broker) -> Iterator[Observer]:
    with Observer(broker.host, broker.port) as observer:
        yield observer


@pytest.fixture(scope="module")
def wrapper() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_runs(broker, tmp_path):
    """As the documentation says: from anywhere, with nothing but a broker."""
    environment = os.environ | {
        "MQTT_URL": broker.url,
        "PYTHONPATH": package_directory(),
        "PYTHONWARNINGS": "error",
    }
    run = subprocess.run(
        [sys.executable, SCRIPT], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30
    )
    assert run.stderr == ""
    assert run.stdout.splitlines() == [
        "heard on a thread: hello world (95%)",
        "heard on the loop: good bye (90%)",
        "batches of [10, 10, 5]",
        "filtered: 21.5",
    ]


def test_a_batch_goes_out_at_its_interval(wrapper, broker, observer):
    """However few items it has."""

    async def publish_one() -> None:
        batching = wrapper.BatchingClient(broker.url, "sensors", batch_interval=0.05)
        await batching.connect()
        await batching.publish_batched("a", 1)
        await asyncio.to_thread(observer.wait_for, "a/batch")
        await batching.shutdown()

    asyncio.run(publish_one())
    assert [seen.data for seen in observer.on("a/batch")] == [{"items": [1], "count": 1}]


def test_nothing_is_lost_at_shutdown(wrapper, broker, observer):
    """The incomplete batches of all topics go out, and the broker has them when `shutdown` returns."""

    async def publish_some() -> None:
        batching = wrapper.BatchingClient(broker.url, "sensors", batch_size=2, batch_interval=60)
        await batching.connect()
        await asyncio.gather(*(batching.publish_batched(topic, n) for n in range(5) for topic in ("a", "b")))
        await batching.shutdown()

    asyncio.run(publish_some())
    for topic in ("a", "b"):
        batches = observer.wait_for(f"{topic}/batch", 3)
        assert [item for batch in batches for item in batch.data["items"]] == list(range(5))


def test_what_a_full_queue_refuses_stays_in_its_batch(wrapper, broker, observer, monkeypatch):
    """The caller learns of it; the items go with the next batch."""

    async def publish_against_a_full_queue() -> None:
        batching = wrapper.BatchingClient(broker.url, "sensors", batch_size=2, batch_interval=60)
        await batching.connect()
        await batching.publish_batched("a", 1)
        with monkeypatch.context() as patch:
            patch.setattr(batching._client, "submit_event", refuse)
            with pytest.raises(wrapper.QueueFullError):
                await batching.publish_batched("a", 2)
        await batching.publish_batched("a", 3)
        await batching.shutdown()

    def refuse(*_: object, **__: object) -> None:
        raise wrapper.QueueFullError("no room")

    asyncio.run(publish_against_a_full_queue())
    (batch,) = observer.wait_for("a/batch")
    assert batch.data["items"] == [1, 2, 3]


def test_each_filter_has_its_own_messages(wrapper, broker, observer):
    heard: list[tuple[str, bytes]] = []

    async def subscribe_twice() -> None:
        filtering = wrapper.FilteringClient(broker.url, "filter")
        await filtering.connect()
        for name in ("a", "b"):

            async def handle(payload: bytes, name: str = name) -> None:
                heard.append((name, payload))

            await filtering.subscribe_with_filter(f"{name}/+", lambda message: True, handle)
        observer.publish("a/1", b"of a")
        observer.publish("b/1", b"of b")
        await asyncio.to_thread(eventually, lambda: len(heard) >= 2)
        await filtering.shutdown()

    asyncio.run(subscribe_twice())
    assert sorted(heard) == [("a", b"of a"), ("b", b"of b")]
