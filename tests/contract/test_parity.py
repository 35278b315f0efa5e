"""Both clients have the same names, parameters and defaults: what is learnt of one is true of the other."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import tars_mqtt
from tars_mqtt import aio

OWN = {"MQTTClient", "MessageIterator", "PublishReceipt", "Subscription"}
"""The names that are not the same object in both modules."""

AWAITED = {
    "MQTTClient.connect",
    "MQTTClient.disconnect",
    "MQTTClient.publish",
    "MQTTClient.publish_event",
    "MQTTClient.publish_health",
    "MQTTClient.run",
    "MQTTClient.shutdown",
    "MQTTClient.subscribe",
    "MQTTClient.wait_connected",
    "MessageIterator.close",
    "MessageIterator.next",
    "PublishReceipt.exception",
    "PublishReceipt.result",
    "Subscription.unsubscribe",
}
"""What blocks in the one, and is a coroutine function in the other."""

SPECIAL = {
    "MQTTClient": ({"__enter__", "__exit__"}, {"__aenter__", "__aexit__"}),
    "MessageIterator": (
        {"__enter__", "__exit__", "__iter__", "__next__"},
        {"__aenter__", "__aexit__", "__aiter__", "__anext__"},
    ),
    "PublishReceipt": (set(), {"__await__"}),
    "Subscription": ({"__enter__", "__exit__"}, {"__aenter__", "__aexit__"}),
}
"""The special methods that each has instead of the other's."""

MEMBERS = sorted(
    f"{name}.{member}"
    for name in OWN
    for cls in (getattr(tars_mqtt, name), getattr(aio, name))
    for member in dir(cls)
    if not member.startswith("_")
)


def pair(member: str) -> tuple[Any, Any]:
    """The same attribute of both classes, as it stands in the class."""
    owner, _, name = member.partition(".")
    sync, asyncio = (
        inspect.getattr_static(getattr(module, owner), name, None) for module in (tars_mqtt, aio)
    )
    return sync, asyncio


def test_both_modules_have_the_same_names():
    assert tars_mqtt.__all__ == aio.__all__


def test_all_but_the_clients_are_the_same_objects():
    """An error of the one is caught as that of the other; an envelope is an envelope."""
    shared = set(tars_mqtt.__all__) - {"__version__"}
    assert {name for name in shared if getattr(tars_mqtt, name) is not getattr(aio, name)} == OWN


@pytest.mark.parametrize("member", sorted(set(MEMBERS)))
def test_both_classes_have_the_member_with_the_same_signature(member):
    """Parameters, their order, kinds, defaults and annotations; a method is a method in both."""
    sync, asyncio = pair(member)
    assert sync is not None
    assert asyncio is not None
    assert isinstance(sync, classmethod) == isinstance(asyncio, classmethod)
    methods = [
        attribute.__func__ if isinstance(attribute, classmethod) else attribute
        for attribute in (sync, asyncio)
    ]
    assert inspect.isfunction(methods[0]) == inspect.isfunction(methods[1])
    if inspect.isfunction(methods[0]):
        assert inspect.signature(methods[0]) == inspect.signature(methods[1])


def test_both_clients_are_made_with_the_same_arguments():
    assert inspect.signature(tars_mqtt.MQTTClient) == inspect.signature(aio.MQTTClient)


def test_what_blocks_in_the_one_is_awaited_in_the_other():
    """And nothing else: whoever changes the import adds ``await`` where the call waits, and nowhere else."""
    coroutines = {member for member in MEMBERS if inspect.iscoroutinefunction(pair(member)[1])}
    assert coroutines == AWAITED
    assert not {member for member in MEMBERS if inspect.iscoroutinefunction(pair(member)[0])}


@pytest.mark.parametrize("name", sorted(OWN))
def test_each_is_used_in_the_way_of_its_world(name):
    """``with`` and ``for`` in the one, ``async with``, ``async for`` and ``await`` in the other."""
    every = set().union(*(methods for pair in SPECIAL.values() for methods in pair))
    sync, asyncio = SPECIAL[name]
    assert {method for method in every if hasattr(getattr(tars_mqtt, name), method)} == sync
    assert {method for method in every if hasattr(getattr(aio, name), method)} == asyncio
