"""What is said of a service's health, and what has the last word."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tars_mqtt import MQTTClientConfig, NotConnectedError
from tars_mqtt.errors import ClosedError
from tars_mqtt.health import Health
from tests.support.way_out import Harness


class Stage(Harness):
    """A service's health, and a network that keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.health = Health(MQTTClientConfig("mqtt://localhost", "me", enable_health=True), self.backlog)
        self.connect()

    def say(self, ok: bool, event: str) -> None:
        self.health.publish(ok, event, None, 0.0)

    def said(self) -> list[Any]:
        return [json.loads(payload)["data"]["event"] for payload in self.payloads()]

    def repeat(self) -> None:
        self.health.tick(time.monotonic() + 1000)

    def answer(self) -> None:
        for message in tuple(self.outbound._inflight.values()):
            self.acknowledge(message)


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_a_greeting_that_has_not_left_is_taken_back_by_the_goodbye(stage: Stage) -> None:
    stage.health.ready(first=True)
    stage.health.goodbye("disconnected")
    assert stage.said() == ["disconnected"]


def test_after_the_goodbye_nobody_is_greeted_until_the_next_life(stage: Stage) -> None:
    stage.health.goodbye("shutdown")
    stage.health.ready(first=True)
    assert stage.said() == ["shutdown"]
    stage.health.start()
    stage.health.ready(first=True)
    assert stage.said() == ["ready"]


def test_connections_that_break_before_the_greeting_is_answered_do_not_heap_greetings_up(
    stage: Stage,
) -> None:
    for _ in range(5):
        stage.health.ready(first=False)
        stage.pump()
        stage.reconnect(resumed=True)
    assert stage.backlog.held == 1
    assert stage.said() == ["reconnected"]


def test_a_goodbye_that_nobody_answered_does_not_have_the_last_word_in_the_next_life(stage: Stage) -> None:
    stage.health.goodbye("disconnected")
    stage.pump()
    stage.disconnect(by_broker=False)
    stage.health.start()
    stage.connect(resumed=True)
    stage.health.ready(first=False)
    assert stage.said() == ["reconnected", "disconnected"]
    stage.health.tick(time.monotonic() + 1.1)
    assert stage.said() == ["reconnected"]


def test_what_the_service_says_of_itself_does_not_come_behind_the_goodbye(stage: Stage) -> None:
    receipt = stage.health.publish(True, "mended", None, 0.0)
    assert receipt is not None
    stage.health.goodbye("disconnected")
    assert stage.said() == ["disconnected"]
    assert isinstance(receipt.exception(0), ClosedError)


def test_a_complaint_is_said_again_behind_the_greeting_and_then_repeated(stage: Stage) -> None:
    stage.say(False, "degraded")
    assert stage.said() == ["degraded"]
    stage.health.ready(first=False)
    assert stage.said() == ["reconnected", "degraded"]
    stage.repeat()
    assert stage.said() == ["degraded"]
    stage.say(True, "mended")
    stage.answer()
    stage.health.ready(first=False)
    assert stage.said() == ["reconnected", "mended"]


def test_a_complaint_outlives_a_handler_that_returned_and_no_shutdown(stage: Stage) -> None:
    stage.say(False, "degraded")
    stage.health.handler_stuck("a")
    stage.health.handlers_returned()
    assert stage.said() == ["degraded", "handler_timeout", "degraded"]
    stage.health.goodbye("shutdown")
    assert stage.said() == ["shutdown"]
    stage.health.start()
    stage.health.ready(first=True)
    assert stage.said() == ["ready"]


def test_what_waits_behind_the_greeting_is_what_is_repeated(stage: Stage) -> None:
    stage.say(True, "calibrated")
    stage.health.ready(first=False)
    assert stage.said() == ["reconnected", "calibrated"]
    stage.repeat()
    assert stage.said() == ["calibrated"]


def test_what_could_not_be_said_is_not_said_later(stage: Stage) -> None:
    stage.backlog.refuse(NotConnectedError("call connect() first"))
    with pytest.raises(NotConnectedError):
        stage.say(False, "degraded")
    stage.backlog.open()
    stage.health.ready(first=True)
    assert stage.said() == ["ready"]
