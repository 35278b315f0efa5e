"""What a handler may look like, and what it may return."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import attrs
import pytest

from tars_mqtt import Envelope, Message, MQTTClient
from tars_mqtt._core.claim import Claims
from tars_mqtt._core.handler import HandlerCall, argument_of
from tars_mqtt._core.lane import Delivery
from tars_mqtt._core.recovery import Outcome
from tars_mqtt._core.stats import Counters
from tars_mqtt._core.throttle import Throttle

if TYPE_CHECKING:
    from collections.abc import Callable


@attrs.frozen
class Reading:
    celsius: float


class Plain:
    """Has no fields that data could fill."""


class Named(TypedDict):
    celsius: float


@attrs.frozen
class Forward:
    later: Later


@attrs.frozen
class Later: ...


def asking_for(annotation: Any) -> Callable[[Any], None]:
    def handler(argument: Any) -> None: ...

    handler.__annotations__["argument"] = annotation
    return handler


@pytest.mark.parametrize("annotation", [bytes, Any, "bytes", Message, Envelope, Reading, Named, Forward])
def test_what_can_be_given_is_accepted(annotation: Any) -> None:
    assert argument_of(asking_for(annotation))


@pytest.mark.parametrize(
    "annotation", [int, str, dict, dict[str, int], Message | None, bytes | str, Plain, MQTTClient, object]
)
def test_what_cannot_be_given_is_refused_when_subscribing(annotation: Any) -> None:
    """Not with each message: the one who can mend it is there now."""
    with pytest.raises(TypeError, match="annotate its first parameter with bytes, Message, Envelope"):
        argument_of(asking_for(annotation))


@pytest.mark.parametrize("handler", [lambda client, userdata, message: None, lambda: None])
def test_a_handler_that_does_not_take_one_argument_is_shown_its_signature(handler: Any) -> None:
    with pytest.raises(TypeError, match=r"one argument, which \(.*\) is not: annotated with Message"):
        argument_of(handler)


def test_builtins_are_handlers_too() -> None:
    assert argument_of([].append)
    assert argument_of(json.loads)


# -- what it returns ------------------------------------------------------------------------------


def called(handler: Callable[[Any], Any]) -> tuple[Outcome, Delivery]:
    call = HandlerCall(handler, Claims(None, "a", "field", Counters(), "c"), Counters(), "c")
    delivery = Delivery(Message("a", b""), None)
    return call(delivery), delivery


async def coroutine(_: Any) -> None: ...


def generator(_: Any) -> Any:
    yield


async def async_generator(_: Any) -> Any:
    yield


@pytest.mark.parametrize("handler", [lambda payload: coroutine(payload), generator, async_generator])
def test_a_handler_that_returns_its_work_undone_has_failed(handler: Any) -> None:
    """Its message was not handled, and must not be acknowledged as if it were."""
    outcome, delivery = called(handler)
    assert outcome is Outcome.FAILED
    assert "did nothing" in delivery.error


@pytest.mark.parametrize("result", [None, 0, "text", [1], iter([1])])
def test_what_else_a_handler_returns_is_nobodys_business(result: Any) -> None:
    outcome, _ = called(lambda _: result)
    assert outcome is Outcome.HANDLED


def second(_: int, message: Message) -> None: ...


class Taker:
    def take(self, message: Message) -> None: ...

    def take_second(self, _: int, message: Message) -> None: ...


@pytest.mark.parametrize(
    "handler",
    [
        functools.partial(second, 1),
        Taker().take,
        functools.partial(Taker().take_second, 1),
        functools.wraps(Taker().take)(lambda message: None),
    ],
)
def test_an_annotation_that_is_text_is_found_behind_what_wraps_the_function(handler: Any) -> None:
    message = Message("a", b"")
    assert argument_of(handler)(message) is message


def test_only_the_first_annotation_has_to_stand_for_something() -> None:
    """Names that are imported for the type checker alone do not exist when it is asked; ours are known."""
    namespace: dict[str, Any] = {}
    exec("def handler(message: Message, more: Nowhere = None) -> Nowhere: ...", namespace)
    message = Message("a", b"")
    assert argument_of(namespace["handler"])(message) is message
    exec("def handler(message: Nowhere): ...", namespace)
    with pytest.raises(TypeError, match="'Nowhere' cannot be resolved"):
        argument_of(namespace["handler"])


def test_what_is_annotated_further_is_what_it_was() -> None:
    message = Message("a", b"")
    assert argument_of(asking_for(Annotated[Message, "more"]))(message) is message


# -- what it raises -------------------------------------------------------------------------------


class SilentError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_an_error_without_words_is_a_failure_like_any_other() -> None:
    def handler(_: Any) -> None:
        raise SilentError

    outcome, delivery = called(handler)
    assert outcome is Outcome.FAILED
    assert delivery.error == "SilentError"


def test_the_log_names_a_handler_and_not_what_was_bound_to_it(caplog: pytest.LogCaptureFixture) -> None:
    def handler(secret: str, _: Any) -> None:
        raise ValueError

    called(functools.partial(handler, "hunter2"))
    assert "handler failed on a message" in caplog.text
    assert "hunter2" not in caplog.records[0].getMessage()


def test_a_flood_of_what_is_not_asked_for_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Anybody who may publish could fill the disk otherwise. Each one is counted."""
    now, counters = 0.0, Counters()
    call = HandlerCall(asking_for(Envelope), Claims(None, "a", "field", counters, "c"), counters, "c")
    call._undecodable_ones = Throttle(5.0, clock=lambda: now)
    for _ in range(100):
        assert call(Delivery(Message("a", b"no envelope"), None)) is Outcome.HOPELESS
    assert len(caplog.records) == 1
    assert "others" not in caplog.text
    now = 5.0
    call(Delivery(Message("b", b"no envelope"), None))
    assert len(caplog.records) == 2
    assert "a message of 'b' with 11 bytes" in caplog.records[1].getMessage()
    assert caplog.records[1].getMessage().endswith("; 99 others since the last warning")
    assert counters.totals()["decode_failures"] == 101
