"""What a handler may look like, and what it may return."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypedDict

import attrs
import pytest

from tars_mqtt import Envelope, Message, MQTTClient
from tars_mqtt._core.handler import HandlerCall, argument_of
from tars_mqtt._core.lane import Delivery
from tars_mqtt._core.recovery import Outcome
from tars_mqtt._core.stats import Counters

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
    call = HandlerCall(handler, "a", Counters(), None, "field", "c")
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
