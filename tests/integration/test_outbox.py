"""The durable outbox: what is accepted goes out, whatever dies."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from tars_mqtt import (
    AckTimeoutError,
    ClosedError,
    Envelope,
    OutboxError,
    PublishRejectedError,
    QueueFullError,
    aio,
)
from tars_mqtt.outbox import Outbox
from tests.support import FaultProxy, eventually, numbers
from tests.support.observer import Observer

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support import Broker


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "outbox.db")


def test_a_backlog_goes_out_in_order_after_the_outage(make_client, broker: Broker, path: str) -> None:
    """More than is held in memory at a time, through one file."""
    received: list[bytes] = []
    client = make_client(broker.url, outbox=path)
    client.subscribe("a", received.append, 1)
    client.connect()
    broker.kill()
    eventually(lambda: not client.connected)
    receipts = [client.submit_event("a", "n", number, qos=1) for number in range(3000)]
    assert client.stats().queued == 3000
    broker.start()
    eventually(lambda: len(received) == 3000, 60)
    assert numbers(received) == list(range(3000))
    assert receipts[-1].result(10) == receipts[-1].envelope_id
    eventually(lambda: client.stats().queued == 0)


def test_what_a_killed_process_had_accepted_goes_out_at_the_next_start(
    make_client, broker: Broker, path: str
) -> None:
    """``kill -9`` of the publisher during an outage: in order, once each."""
    received: list[bytes] = []
    listener = make_client(broker.url)
    listener.subscribe("a", received.append, 1)
    listener.connect()
    with FaultProxy(broker.url) as proxy:
        script = f"""
import os
from tars_mqtt import MQTTClient
client = MQTTClient({proxy.url!r}, "publisher", outbox={path!r})
client.connect()
print("connected", flush=True)
input()
for number in range(200):
    client.submit_event("a", "n", number, qos=1)
os.kill(os.getpid(), 9)
"""
        with subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as publisher:
            assert publisher.stdout is not None
            assert publisher.stdout.readline() == "connected\n"
            proxy.refuse()
            proxy.cut()
            publisher.communicate("now\n")
    assert publisher.returncode == -signal.SIGKILL
    assert received == []
    client = make_client(broker.url, client_id="publisher", outbox=path)
    client.connect()
    eventually(lambda: len(received) >= 200)
    assert numbers(received) == list(range(200))


def test_what_shutdown_could_not_send_stays_in_the_file(
    make_client, broker: Broker, path: str, caplog
) -> None:
    caplog.set_level(logging.INFO, "tars_mqtt")
    received: list[bytes] = []
    client = make_client(broker.url, outbox=path, shutdown_timeout=0.5)
    client.connect()
    broker.kill()
    eventually(lambda: not client.connected)
    receipt = client.submit_event("a", "n", 7, qos=1)
    client.shutdown()
    with pytest.raises(ClosedError, match="stays in the outbox"):
        receipt.result(0)
    assert f"1 messages stay in the outbox {path}" in caplog.text
    broker.start()
    heir = make_client(broker.url, outbox=path)
    heir.subscribe("a", received.append, 1)
    heir.connect()
    eventually(lambda: numbers(received) == [7])


def test_how_one_process_was_doing_is_not_said_of_the_next(make_client, broker: Broker, path: str) -> None:
    """Left in the file, it would come behind the greeting of the next, and stay."""
    options = {"outbox": path, "enable_health": True, "publish_timeout": 0.2}
    first = make_client(broker.url, "service", **options)
    first.connect()
    broker.kill()
    with pytest.raises(AckTimeoutError):
        first.publish_health(False, "disk_full")
    first.submit_event("a", "n", 1, qos=1)
    first.shutdown(0.1)
    broker.start()
    second = make_client(broker.url, "service", **options)
    second.connect()
    with Observer(broker.host, broker.port) as observer:
        second.publish_event("a", "n", 2, qos=1)
        eventually(lambda: 2 in numbers([seen.payload for seen in observer.on("a")]))
        assert [seen.data["event"] for seen in observer.on("system/health/service")] == ["ready"]


def test_the_outbox_is_bounded_by_count_and_bytes(make_client, broker: Broker, path: str) -> None:
    client = make_client(broker.url, outbox=path, outbox_max_messages=3, outbox_max_bytes=1000)
    client.connect()
    broker.freeze()
    try:
        with pytest.raises(QueueFullError):
            client.publish("a", b"x" * 2000, qos=1)
        for number in range(3):
            client.submit_event("a", "n", number, qos=1)
        with pytest.raises(QueueFullError):
            client.submit_event("a", "n", 3, qos=1, timeout=0)
    finally:
        broker.thaw()


def test_what_is_too_old_is_not_sent(make_client, broker: Broker, path: str) -> None:
    """It failed then; what is younger is sent as ever."""
    client = make_client(broker.url, outbox=path, outbox_max_age=1.0)
    client.connect()
    client.publish_event("a", "n", 0, qos=1)
    broker.kill()
    eventually(lambda: not client.connected)
    old = client.submit_event("a", "n", 1, qos=1)
    with pytest.raises(TimeoutError):
        old.result(1.1)
    broker.start()
    with pytest.raises(PublishRejectedError, match="outbox_max_age"):
        old.result(10)
    client.publish_event("a", "n", 2, qos=1)


async def test_a_slow_disk_holds_up_no_event_loop(broker: Broker, path: str) -> None:
    """Publishes of many tasks wait together, and leave in order; what the disk refuses fails its publish."""
    received: list[bytes] = []
    async with aio.MQTTClient(broker.url, "slow-disk", outbox=path) as client:
        await client.subscribe("a", received.append, 1)
        outbox = client._engine.backlog._spool._outbox
        with outbox._turn:  # the disk takes its time
            tasks = [asyncio.create_task(client.publish_event("a", "n", n, qos=1)) for n in range(50)]
            await asyncio.sleep(0.1)
            assert not any(task.done() for task in tasks)
            assert client.stats().queued == 50
        await asyncio.gather(*tasks)
        await asyncio.to_thread(eventually, lambda: len(received) == 50)
        assert numbers(received) == list(range(50))

        outbox._connection.execute("PRAGMA max_page_count = 1")
        with pytest.raises(OutboxError, match="full"):
            await client.publish_event("a", "n", "x" * 1_000_000, qos=1)
        assert client.stats().queued == 0


async def test_a_shutdown_writes_what_waits_for_the_disk(broker: Broker, path: str) -> None:
    """What a publish had left to the disk is in the file afterwards, and its caller is told so."""
    client = aio.MQTTClient(broker.url, "in-a-hurry", outbox=path)
    await client.connect()
    broker.freeze()
    try:
        spool = client._engine.backlog._spool
        spool._later = lambda delay, call: None  # the time for the commit does not come
        publishing = asyncio.create_task(client.publish_event("a", "n", 1, qos=1))
        await asyncio.sleep(0)
        await client.shutdown(0.5)
        with pytest.raises(ClosedError, match="stays in the outbox"):
            await publishing
    finally:
        broker.thaw()
    outbox = Outbox(path)
    assert outbox.totals()[0] == 1
    outbox.close()


def test_two_clients_on_one_file_are_refused(make_client, broker: Broker, path: str) -> None:
    make_client(broker.url, outbox=path).connect()
    with pytest.raises(OutboxError, match="in use by another process"):
        make_client(broker.url, outbox=path).connect()


def test_what_was_handled_is_known_after_a_restart(make_client, broker: Broker, path: str) -> None:
    """Effectively once: a redelivery after a restart is filtered, as it would have been before."""
    handled: list[str] = []
    envelope = Envelope.new("n", 1, source="s")
    durable = {"outbox": path, "dedupe_durable": True, "dedupe_ttl": 60, "dedupe_max_entries": 10}
    for _ in range(2):
        client = make_client(broker.url, client_id="handler", **durable)
        client.subscribe("a", lambda payload: handled.append(Envelope.from_bytes(payload).id), 1)
        client.connect()
        client.publish("a", envelope.to_bytes(), qos=1)
        eventually(lambda client=client: client.stats().messages_in == 1 and not client.stats().pending)
        client.shutdown()
    assert handled == [envelope.id]


def test_a_handler_that_ends_while_the_client_is_shut_down_is_remembered(
    make_client, broker: Broker, path: str
) -> None:
    """It ends when nobody waits for it to be idle any more, but within the time for the shutdown."""
    handled: list[str] = []
    begun, go_on = threading.Event(), threading.Event()
    envelope = Envelope.new("n", 1, source="s")
    durable = {"outbox": path, "dedupe_durable": True, "dedupe_ttl": 60, "dedupe_max_entries": 10}

    def handler(payload: bytes) -> None:
        begun.set()
        assert go_on.wait(10)
        handled.append(Envelope.from_bytes(payload).id)

    client = make_client(broker.url, client_id="handler", **durable)
    client.subscribe("a", handler, 1)
    client.connect()
    client.publish("a", envelope.to_bytes(), qos=1)
    assert begun.wait(10)
    dispatcher = client._engine.dispatcher
    wait_idle, stop = dispatcher.wait_idle, dispatcher.stop
    dispatcher.wait_idle = lambda timeout: wait_idle(0.0)

    def stop_after_the_handler(timeout: float) -> list[str]:
        go_on.set()
        assert wait_idle(10.0)
        return stop(timeout)

    dispatcher.stop = stop_after_the_handler
    client.shutdown()
    assert handled == [envelope.id]
    heir = make_client(broker.url, client_id="handler", **durable)
    heir.subscribe("a", handler, 1)
    heir.connect()
    heir.publish("a", envelope.to_bytes(), qos=1)
    eventually(lambda: heir.stats().messages_in >= 1 and not heir.stats().pending)
    assert handled == [envelope.id]
