"""Which subscriptions there are, and which filters the broker is asked for on their behalf."""

from __future__ import annotations

import threading
import zlib
from collections import defaultdict

from tars_mqtt._core.dispatch import Consumer
from tars_mqtt._core.lane import Fifo
from tars_mqtt._core.registry import _LAST_IDENTIFIER, _MOST_GONE, Registration, Registry


def registration(topic: str = "a/+", qos: int = 0) -> Registration:
    return Registration(topic, qos, Consumer(Fifo(), 1, None))


def added(registry: Registry, topic: str = "a/+", qos: int = 0) -> Registration:
    entry = registration(topic, qos)
    registry.add(entry)
    return entry


def test_identities_are_never_used_twice_and_are_the_same_in_each_run() -> None:
    """What deduplication remembers across restarts is found again by them, and taken for nobody else's."""

    def identities(*subscriptions: tuple[str, str]) -> dict[tuple[str, str], list[str]]:
        registry, found = Registry(), defaultdict(list)
        for topic, handler in subscriptions:
            found[topic, handler].append(registry.next_identity(topic, handler))
        return found

    one, other, elsewhere = ("a", "bill"), ("a", "log"), ("b", "bill")
    run = identities(one, other, elsewhere, one)
    assert len({identity for same in run.values() for identity in same}) == 4
    assert identities(elsewhere, other, one, one) == run
    assert identities(("new", "bill"), ("a", "new"), one, other, one, elsewhere) | run == run | {
        ("new", "bill"): ["new#bill#1"],
        ("a", "new"): ["a#new#1"],
    }


def test_registrations_of_the_same_filter_share_an_entry() -> None:
    registry = Registry()
    first, second = added(registry), added(registry)
    (entry,) = registry.entries()
    assert entry.topic_filter == "a/+"
    assert entry.registrations == (first, second)


def test_the_broker_is_asked_for_the_highest_qos() -> None:
    registry = Registry()
    for qos, expected in ((1, 1), (0, 1), (2, 2)):
        entry = registry.add(registration(qos=qos))
        assert entry.qos == expected


def test_each_filter_is_an_entry_in_order_of_registration() -> None:
    registry = Registry()
    for topic in ("b", "a", "$share/g/a", "b", "#"):
        added(registry, topic)
    assert [entry.topic_filter for entry in registry.entries()] == ["b", "a", "$share/g/a", "#"]


def test_a_filter_is_given_up_with_its_last_registration() -> None:
    registry = Registry()
    first, second = added(registry), added(registry)
    assert registry.remove(first) is None
    assert [entry.registrations for entry in registry.entries()] == [(second,)]
    entry = registry.remove(second)
    assert entry is not None
    assert entry.topic_filter == "a/+"
    assert registry.entries() == []
    assert registry.router.match("a/b") == ()


def test_removing_twice_or_what_was_never_added_does_nothing() -> None:
    registry = Registry()
    first, second = added(registry), added(registry)
    registry.remove(first)
    assert registry.remove(first) is None
    assert registry.remove(registration("b")) is None
    (entry,) = registry.entries()
    assert entry.registrations == (second,)


def test_every_change_makes_a_new_router() -> None:
    """Whoever keeps what he found in the old one notices."""
    registry = Registry()
    routers = [registry.router]
    first = added(registry)
    routers.append(registry.router)
    second = added(registry)
    routers.append(registry.router)
    registry.remove(second)
    routers.append(registry.router)
    registry.remove(first)
    routers.append(registry.router)
    assert len({id(router) for router in routers}) == 5


# -- subscription identifiers -------------------------------------------------------------


def test_a_filter_has_the_same_identifier_in_every_process() -> None:
    """The broker's session outlives a process, and its messages bear the identifier of the last one."""
    identifiers = set()
    for others in ((), ("b", "c"), ("$share/g/a/+",)):
        registry = Registry()
        for other in others:
            added(registry, other)
        identifiers.add(registry.add(registration()).identifier)
    assert len(identifiers) == 1
    registry = Registry()
    first = added(registry)
    before = registry.entries()[0].identifier
    registry.remove(first)
    assert registry.add(registration()).identifier == before


def test_identifiers_differ_and_stay_in_their_range(monkeypatch) -> None:
    """Also where the hashes of two filters are the same, and at the end of the range."""
    monkeypatch.setattr(zlib, "crc32", lambda _: _LAST_IDENTIFIER - 1)
    registry = Registry()
    identifiers = [registry.add(registration(topic)).identifier for topic in "abc"]
    assert identifiers == [_LAST_IDENTIFIER, 1, 2]


def test_many_threads_may_register_and_remove_at_once() -> None:
    registry = Registry()
    barrier = threading.Barrier(4)

    def come_and_go(thread: int) -> None:
        for number in range(100):
            barrier.wait(10)
            first = added(registry, f"t/{number % 2}")
            added(registry, f"stays/{thread}/{number}")
            registry.remove(first)

    threads = [threading.Thread(target=come_and_go, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    entries = registry.entries()
    assert sorted(entry.topic_filter for entry in entries) == sorted(
        f"stays/{thread}/{number}" for thread in range(4) for number in range(100)
    )
    assert len({entry.identifier for entry in entries}) == 400


def test_a_subscription_is_known_by_what_it_is_and_not_by_what_came_and_went_before() -> None:
    """After a restart it is to be recognised, with another number of questions asked."""
    names = []
    for others in (0, 3):
        registry = Registry()
        for _ in range(others):
            for topic in ("replies", "orders"):
                registry.next_identity(topic, "reply")
                registry.remove(added(registry, topic))
        names.append(registry.next_identity("orders", "bill"))
    assert names[0] == names[1]


def test_a_subscription_that_comes_again_is_another_one() -> None:
    """What the one before has seen, this one has not: a retained message, for instance."""
    registry = Registry()
    first = registry.next_identity("a", "handler")
    registry.remove(added(registry, "a"))
    assert registry.next_identity("a", "handler") != first


def test_not_all_filters_that_are_gone_are_remembered() -> None:
    """A reply topic for each request would fill the memory."""
    registry = Registry()
    registry.next_identity("stays", "handler")
    added(registry, "stays")
    for number in range(2 * _MOST_GONE):
        registry.next_identity(f"replies/{number}", "reply")
        registry.remove(added(registry, f"replies/{number}"))
    assert len(registry._uses) == 1 + _MOST_GONE
    assert registry.next_identity("stays", "handler").endswith("2")
