"""`Message` and `PublishReceipt`: what is shown, what is decoded, and that exactly one outcome wins."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from concurrent.futures import CancelledError
from typing import Any

import pytest

from tars_mqtt import AckTimeoutError, ClosedError, DecodeError, Envelope, Message, PublishReceipt, aio
from tars_mqtt.aio.loop import Bridge
from tests.support.wait import eventually


def test_a_message_shows_no_payload() -> None:
    message = Message("a/b", b"secret", 1, retain=True)
    assert repr(message) == "<Message on 'a/b', 6 bytes, qos 1, retained>"


def test_the_envelope_is_decoded_once() -> None:
    envelope = Envelope.new("t", {"n": 1}, source="s")
    message = Message("a", envelope.to_bytes())
    assert message.envelope == envelope
    assert message.envelope is message.envelope


def test_what_cannot_be_decoded_raises_afresh_each_time() -> None:
    """Each handler gets its own instance, and its own traceback."""
    message = Message("a", b"no json")
    errors = []
    for _ in range(2):
        with pytest.raises(DecodeError) as caught:
            _ = message.envelope
        errors.append(caught.value)
    assert errors[0] is not errors[1]
    assert str(errors[0]) == str(errors[1])


def test_properties_have_the_names_of_the_standard() -> None:
    raw = b"\x03\x00\x04json" + b"\x08\x00\x05reply" + b"\x26\x00\x01k\x00\x01v"
    properties = Message("a", b"", raw_properties=raw).properties
    assert properties["content_type"] == "json"
    assert properties["response_topic"] == "reply"
    assert properties["user_properties"] == [("k", "v")]
    assert dict(Message("a", b"").properties) == {}


def test_a_receipt_is_done_once() -> None:
    receipt = PublishReceipt("id", "a", 1)
    assert not receipt.done()
    receipt._settle()
    receipt._fail(ClosedError("too late"))
    assert receipt.done()
    assert receipt.result(0) == "id"
    assert receipt.exception(0) is None
    assert not receipt.cancel()


def test_waiting_in_vain_carries_the_receipt() -> None:
    receipt = PublishReceipt("id", "a", 1)
    for wait in (0, 0.01):
        with pytest.raises(AckTimeoutError) as caught:
            receipt.result(wait)
        assert caught.value.receipt is receipt
    receipt._settle()
    assert receipt.result(0) == "id"


def test_each_waiter_gets_its_own_error() -> None:
    receipt = PublishReceipt("id", "a", 1)
    receipt._fail(ClosedError("gone"))
    errors = []
    for _ in range(2):
        with pytest.raises(ClosedError, match="gone") as caught:
            receipt.result(0)
        errors.append(caught.value)
    assert errors[0] is not errors[1]
    assert errors[0] is not receipt.exception(0)


def test_it_can_be_taken_back_until_it_is_sent() -> None:
    unsent, sent = PublishReceipt("1", "a", 1), PublishReceipt("2", "a", 1)
    assert sent._mark_sent()
    assert unsent.cancel()
    assert unsent.cancelled()
    assert not sent.cancel()
    assert not unsent._mark_sent()
    with pytest.raises(CancelledError):
        unsent.result(0)
    assert sent._mark_sent(), "a repetition is no new message"


@pytest.mark.parametrize("for_ever", [None, float("inf"), 1e12])
def test_a_wait_may_be_as_long_as_you_like(for_ever: float | None) -> None:
    """Longer than the operating system can count, for both clients' receipts."""
    receipt = PublishReceipt("id", "a", 1)
    settling = threading.Timer(0.05, receipt._settle)
    settling.start()
    assert receipt.result(for_ever) == "id"
    settling.join()
    assert asyncio.run(awaited(for_ever)) == "id"


@pytest.mark.parametrize("wrong", ["3", -1, float("nan"), True])
def test_a_wait_that_is_no_time_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="timeout must be a number of seconds"):
        PublishReceipt("id", "a", 1).result(wrong)
    with pytest.raises(ValueError, match="timeout must be a number of seconds"):
        asyncio.run(awaited(wrong))


async def awaited(timeout: Any) -> str | None:
    """The result of a receipt that comes true while an event loop waits for it."""
    bridge = Bridge()
    bridge.bind(asyncio.get_running_loop())
    receipt = PublishReceipt("id", "a", 1)
    asyncio.get_running_loop().call_later(0.05, receipt._settle)
    return await aio.PublishReceipt(receipt, bridge).result(timeout)


def test_callbacks_are_called_once_whenever_they_come() -> None:
    receipt = PublishReceipt("id", "a", 1)
    told: list[str] = []
    receipt._add_done_callback(lambda _: told.append("early"))
    receipt._mark_sent()
    assert told == []
    receipt._settle()
    receipt._add_done_callback(lambda _: told.append("late"))
    assert told == ["early", "late"]


def test_a_thread_that_waits_is_woken() -> None:
    receipt = PublishReceipt("id", "a", 1)
    results: list[str | None] = []
    threads = [threading.Thread(target=lambda: results.append(receipt.result(10))) for _ in range(5)]
    for thread in threads:
        thread.start()
    eventually(lambda: isinstance(receipt._then, list) and len(receipt._then) == 5)
    receipt._settle()
    for thread in threads:
        thread.join(10)
    assert results == ["id"] * 5


def test_one_of_cancel_and_send_wins() -> None:
    """Both come at the same moment, hundreds of times: never both, never neither."""
    for _ in range(300):
        receipt = PublishReceipt("id", "a", 1)
        start = threading.Barrier(2)
        cancelled: list[bool] = []
        thread = threading.Thread(target=cancel_at, args=(start, receipt, cancelled))
        thread.start()
        start.wait()
        sent = receipt._mark_sent()
        thread.join()
        assert cancelled == [not sent]


def cancel_at(start: threading.Barrier, receipt: PublishReceipt, cancelled: list[bool]) -> None:
    start.wait()
    cancelled.append(receipt.cancel())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_while_a_receipt_is_settled_leaves_the_child_able_to_settle_its_own() -> None:
    with PublishReceipt._lock:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(5)
            PublishReceipt(None, "a", 1)._settle()
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("colour", ["threads", "asyncio"])
def test_who_asks_again_and_again_leaves_nothing_behind(colour: str) -> None:
    receipt = PublishReceipt("id", "a", 1)

    async def ask() -> None:
        bridge = Bridge()
        bridge.bind(asyncio.get_running_loop())
        for _ in range(5):
            with pytest.raises(AckTimeoutError):
                await aio.PublishReceipt(receipt, bridge).result(0.001)

    if colour == "asyncio":
        asyncio.run(ask())
    else:
        for _ in range(5):
            with pytest.raises(AckTimeoutError):
                receipt.result(0.001)
    assert receipt._then == []
    receipt._settle()
    assert receipt.result(0) == "id"


def test_a_message_for_a_test_has_what_it_was_given() -> None:
    properties = {"response_topic": "b", "user_properties": [("k", "v")], "correlation_data": b"1"}
    message = Message.new("a", b"x", 1, retain=True, properties=properties)
    assert (message.topic, message.payload, message.qos, message.retain) == ("a", b"x", 1, True)
    assert dict(message.properties) == properties
    assert Message.new("a", b"").properties == {}
