"""Handlers that fail: retries, dead letters, time limits. Nothing is acknowledged before its time."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from tars_mqtt import Envelope, TopicError
from tests.support.wait import eventually

if TYPE_CHECKING:
    from tests.support import Broker


class Flaky:
    """A handler that fails so many times for each of some numbers."""

    def __init__(self, **failures: int) -> None:
        self.failures = {int(name[1:]): count for name, count in failures.items()}
        self.calls: list[tuple[int, float]] = []

    def __call__(self, envelope: Envelope) -> None:
        number = envelope.data
        self.calls.append((number, time.monotonic()))
        if sum(1 for called, _ in self.calls if called == number) <= self.failures.get(number, 0):
            raise RuntimeError(f"not number {number}")

    @property
    def order(self) -> list[int]:
        return [number for number, _ in self.calls]


def test_a_failure_is_tried_again_and_order_is_kept(make_client, broker: Broker) -> None:
    """The lane waits for the retry; another subscription goes on."""
    flaky, others = Flaky(n1=2), []
    client = make_client(broker.url)
    client.subscribe("a", lambda payload: flaky(Envelope.from_bytes(payload)), 1, retries=2, retry_delay=0.1)
    client.subscribe("b", others.append, 1)
    client.connect()
    for number in range(4):
        client.submit_event("a", "n", number, qos=1)
        client.submit_event("b", "n", number, qos=1)
    eventually(lambda: len(others) == 4)
    assert flaky.order != [0, 1, 1, 1, 2, 3]
    eventually(lambda: flaky.order == [0, 1, 1, 1, 2, 3])
    stats = client.stats()
    assert (stats.handler_failures, stats.handler_retries) == (2, 2)
    first, second, third = (moment for number, moment in flaky.calls if number == 1)
    assert second - first >= 0.05, "half of the delay is fixed"
    assert third - second >= 0.1, "and it is doubled"


def test_what_no_attempt_could_handle_becomes_a_dead_letter(make_client, broker: Broker) -> None:
    """An envelope with the original payload, topic, error, attempts and times."""
    flaky, dead = Flaky(n1=99), []
    client = make_client(broker.url)
    client.subscribe(
        "a/+",
        lambda payload: flaky(Envelope.from_bytes(payload)),
        1,
        retries=1,
        retry_delay=0.01,
        dead_letter="dead/{topic}",
    )
    client.subscribe("dead/#", lambda payload: dead.append(Envelope.from_bytes(payload)), 1)
    client.connect()
    receipt = client.submit_event("a/b", "n", 1, qos=1, correlation_id="request-1")
    client.submit_event("a/b", "n", 2, qos=1)
    eventually(lambda: dead and 2 in flaky.order)
    (letter,) = dead
    assert letter.type == "dead_letter"
    assert letter.correlation_id == "request-1"
    assert (letter.data["topic"], letter.data["filter"], letter.data["attempts"]) == ("a/b", "a/+", 2)
    assert letter.data["error"] == "RuntimeError: not number 1"
    assert Envelope.from_bytes(letter.data["payload"]).id == receipt.envelope_id
    assert letter.data["failed_first"] <= letter.data["failed_last"]
    # The letter may arrive before the broker acknowledges it, which is when it counts.
    eventually(lambda: client.stats().dead_letters == 1)


def test_a_dead_letter_that_comes_to_the_handler_it_is_of_is_the_last(
    make_client, broker: Broker, caplog
) -> None:
    """Otherwise each would hold the one before, for ever."""
    calls: list[str] = []

    def failing(envelope: Envelope) -> None:
        calls.append(envelope.type)
        raise RuntimeError("never")

    client = make_client(broker.url)
    client.subscribe("a/#", failing, 1, dead_letter="a/dead/{topic}")
    client.connect()
    client.publish_event("a/b", "n", 1, qos=1)
    eventually(lambda: client.stats().dropped.get("dead_letter") == 1)
    eventually(lambda: client.stats().pending == 0)
    assert calls == ["n", "dead_letter"]
    assert "it is one itself" in caplog.text


def test_what_cannot_be_decoded_is_not_tried_again(make_client, broker: Broker) -> None:
    dead = []
    client = make_client(broker.url)

    def typed(envelope: Envelope) -> None:
        raise AssertionError("it must not be called")

    client.subscribe("a", typed, 1, retries=5, retry_delay=60, dead_letter="dead")
    client.subscribe("dead", lambda payload: dead.append(Envelope.from_bytes(payload)), 1)
    client.connect()
    client.publish("a", b"\xff\xfe", qos=1)
    eventually(lambda: dead)
    assert (dead[0].data["payload"], dead[0].data["encoding"]) == ("//4=", "base64")
    assert client.stats().decode_failures == 1


@pytest.mark.parametrize(
    "retry_on",
    [OSError, (OSError, KeyError), lambda error: isinstance(error, OSError)],
    ids=["class", "classes", "function"],
)
def test_only_what_another_attempt_may_cure_is_tried_again(
    make_client, shared_broker, unique, retry_on
) -> None:
    calls: list[int] = []
    dead: list[str] = []

    def handler(event: Envelope) -> None:
        calls.append(event.data)
        raise ValueError("never") if event.data == 0 else ConnectionError("later")

    client = make_client(shared_broker.url)
    client.subscribe(
        unique, handler, 1, retries=2, retry_on=retry_on, retry_delay=0.01, dead_letter=f"{unique}/dead"
    )
    client.subscribe(
        f"{unique}/dead", lambda payload: dead.append(Envelope.from_bytes(payload).data["error"]), 1
    )
    client.connect()
    for number in range(2):
        client.publish_event(unique, "n", number, qos=1)
    eventually(lambda: len(dead) == 2)
    assert calls == [0, 1, 1, 1]
    assert dead == ["ValueError: never", "ConnectionError: later"]


def test_a_function_for_retry_on_that_fails_forbids_no_attempt(
    make_client, shared_broker, unique, caplog
) -> None:
    flaky = Flaky(n1=1)

    def broken(error: BaseException) -> bool:
        raise RuntimeError("of the function's own")

    client = make_client(shared_broker.url)
    client.subscribe(
        unique,
        lambda payload: flaky(Envelope.from_bytes(payload)),
        1,
        retries=1,
        retry_on=broken,
        retry_delay=0.01,
    )
    client.connect()
    client.publish_event(unique, "n", 1, qos=1)
    eventually(lambda: flaky.order == [1, 1])
    assert "retry_on failed" in caplog.text


@pytest.mark.parametrize(("retry_on", "attempts"), [(TimeoutError, 2), (ValueError, 1)])
def test_a_time_out_counts_as_a_timeout_error(make_client, shared_broker, unique, retry_on, attempts) -> None:
    release, calls, dead = threading.Event(), [], []

    def handler(payload: bytes) -> None:
        calls.append(payload)
        release.wait(20)

    client = make_client(shared_broker.url)
    client.subscribe(
        unique,
        handler,
        1,
        handler_timeout=0.2,
        retries=1,
        retry_on=retry_on,
        retry_delay=0.01,
        dead_letter=f"{unique}/dead",
    )
    client.subscribe(f"{unique}/dead", dead.append, 1)
    client.connect()
    try:
        client.publish(unique, b"x", qos=1)
        eventually(lambda: dead)
        assert len(calls) == attempts
    finally:
        release.set()


def test_a_message_is_acknowledged_after_its_dead_letter(make_client, broker: Broker) -> None:
    """While the retries last, the broker still holds the message."""
    flaky = Flaky(n1=99)
    client = make_client(broker.url, client_id="owner", session_expiry=60)
    client.subscribe("a", lambda payload: flaky(Envelope.from_bytes(payload)), 1, retries=9, retry_delay=5)
    client.connect()
    client.publish_event("a", "n", 1, qos=1)
    eventually(lambda: flaky.order == [1])
    client.shutdown(timeout=0.5)
    again: list[bytes] = []
    heir = make_client(broker.url, client_id="owner", session_expiry=60)
    heir.subscribe("a", again.append, 1)
    heir.connect()
    eventually(lambda: len(again) == 1)


def test_a_handler_that_does_not_return_costs_its_message_and_not_its_lane(
    make_client, broker: Broker
) -> None:
    release, calls, dead, health = threading.Event(), [], [], []
    client = make_client(broker.url, enable_health=True, source_name="stuck")

    def handler(payload: bytes) -> None:
        number = Envelope.from_bytes(payload).data
        calls.append(number)
        if number == 0:
            release.wait(20)

    client.subscribe("a", handler, 1, handler_timeout=0.3, dead_letter="dead")
    client.subscribe("dead", lambda payload: dead.append(Envelope.from_bytes(payload).data), 1)
    client.subscribe(
        "system/health/stuck", lambda payload: health.append(Envelope.from_bytes(payload).data), 1
    )
    client.connect()
    try:
        for number in range(3):
            client.submit_event("a", "n", number, qos=1)
        eventually(lambda: calls == [0, 1, 2])
        eventually(lambda: dead)
        assert dead[0]["error"] == "the handler did not return within 0.3 s"
        assert client.stats().handler_timeouts == 1
        if make_client.colour == "sync":
            eventually(lambda: health and health[-1]["event"] == "handler_timeout")
            assert health[-1]["ok"] is False
    finally:
        release.set()
    if make_client.colour == "sync":
        eventually(lambda: health[-1]["event"] == "handler_returned")


def test_stuck_handlers_do_not_use_up_the_workers(make_client, broker: Broker) -> None:
    if make_client.colour == "aio":
        pytest.skip("tasks are cancelled, and have no workers to use up")
    release, others = threading.Event(), []
    client = make_client(broker.url, workers=2)
    client.subscribe("stuck", lambda payload: release.wait(20), 1, handler_timeout=0.2, concurrency=2)
    client.subscribe("others", others.append, 1)
    client.connect()
    try:
        for number in range(2):
            client.publish_event("stuck", "n", number, qos=1)
        client.publish("others", b"goes on", qos=1)
        eventually(lambda: others == [b"goes on"])
    finally:
        release.set()


async def coroutine_function(_: object) -> None: ...


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"retry_on": coroutine_function}, TypeError),
        ({"order_by": coroutine_function}, TypeError),
        ({"retries": -1}, ValueError),
        ({"retries": 1.5}, ValueError),
        ({"retry_delay": -1}, ValueError),
        ({"retry_delay": None}, ValueError),
        ({"dead_letter": "dead/#"}, TopicError),
        ({"dead_letter": 5}, TopicError),
        ({"dead_letter": "dead/{id}"}, TopicError),
        ({"handler_timeout": -1}, ValueError),
        ({"concurrency": 0}, ValueError),
        ({"order_by": "key"}, ValueError),
        ({"retrys": 1}, TypeError),
        ({"retry_on": "OSError"}, TypeError),
        ({"retry_on": str}, TypeError),
        ({"retry_on": (OSError, str)}, TypeError),
        ({"retry_on": OSError()}, TypeError),
    ],
)
def test_options_out_of_range_are_refused_on_the_callers_line(make_client, options, error) -> None:
    client = make_client("mqtt://localhost:1")
    with pytest.raises(error):
        client.subscribe("a", lambda payload: None, **options)
