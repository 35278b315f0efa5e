"""The filter tree: what matches, in what order, and that nothing changes under a reader."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tars_mqtt._core import router as router_module
from tars_mqtt._core.router import Router


def build(*filters: str) -> Router[str]:
    """Each filter is its own entry."""
    router: Router[str] = Router()
    for topic_filter in filters:
        router = router.add(topic_filter, topic_filter)
    return router


def matches_by_the_standard(topic_filter: str, topic: str) -> bool:
    """Section 4.7 of MQTT 5, sentence by sentence, and section 4.8.2 for ``$share``."""
    if topic_filter.startswith("$share/"):
        topic_filter = topic_filter.split("/", 2)[2]
    # [MQTT-4.7.2-1]: filters starting with a wildcard do not match topics beginning with $.
    if topic[0] == "$" and topic_filter[0] in "+#":
        return False
    return levels_match(topic_filter.split("/"), topic.split("/"))


def levels_match(filter_levels: list[str], topic_levels: list[str]) -> bool:
    if filter_levels == ["#"]:  # the parent, which left no level, and any number of child levels
        return True
    if not filter_levels or not topic_levels:
        return filter_levels == topic_levels
    head = filter_levels[0]
    return (head in ("+", topic_levels[0])) and levels_match(filter_levels[1:], topic_levels[1:])


level = st.sampled_from(["", "a", "b", "$x"])
topics = st.lists(level, min_size=1, max_size=6).map("/".join).filter(bool)
plain_filters = st.builds(
    lambda levels, last: "/".join(levels + last),
    st.lists(level | st.just("+"), max_size=5),
    st.sampled_from([["#"], ["+"], ["a"], [""]]),
).filter(bool)
filters = plain_filters | st.builds("$share/{}/{}".format, st.sampled_from(["g", "h"]), plain_filters)
# Adding and removing, with a number that tells a replaced entry from the first one.
changes = st.lists(st.tuples(filters, st.integers(0, 3)), max_size=25)


@given(st.lists(filters, max_size=25), st.lists(topics, min_size=1, max_size=5))
def test_what_the_standard_says_matches_is_found_once_in_order_of_registration(
    registered: list[str], asked: list[str]
) -> None:
    router = build(*registered)
    for topic in asked:
        expected = tuple(f for f in dict.fromkeys(registered) if matches_by_the_standard(f, topic))
        assert router.match(topic) == expected
        assert router.match(topic) == expected, "from the cache"


@given(changes, topics)
@example([("a", 1), ("b", 1), ("a", 0), ("a", 2)], "a")
def test_it_is_a_dict_that_is_searched_by_topic(steps: list[tuple[str, int]], topic: str) -> None:
    """Every router on the way stays what it was, whatever is derived from it."""
    router: Router[tuple[str, int]] = Router()
    known: dict[str, tuple[str, int]] = {}
    past = [(router, dict(known))]
    for topic_filter, number in steps:
        if number:
            router = router.add(topic_filter, (topic_filter, number))
            known[topic_filter] = (topic_filter, number)
        else:
            router = router.remove(topic_filter)
            known.pop(topic_filter, None)
        past.append((router, dict(known)))
    for then, expected in past:
        assert len(list(then)) == len(expected)
        assert list(then) == list(expected.values())
        matching = [entry for entry in expected.values() if matches_by_the_standard(entry[0], topic)]
        assert then.match(topic) == tuple(matching)
        for topic_filter, _ in steps:
            assert then.get(topic_filter) == expected.get(topic_filter)


@given(st.lists(filters, max_size=15, unique=True))
def test_what_is_removed_leaves_nothing_behind(registered: list[str]) -> None:
    router = build(*registered)
    for topic_filter in reversed(registered):
        router = router.remove(topic_filter)
    assert router._root == Router[str]()._root


@pytest.mark.parametrize(
    ("topic_filter", "matching", "others"),
    [
        # 4.7.1.2
        (
            "sport/tennis/player1/#",
            ["sport/tennis/player1", "sport/tennis/player1/ranking", "sport/tennis/player1/score/wimbledon"],
            ["sport/tennis", "sport/tennis/player2", "sport/tennis/player10"],
        ),
        ("sport/#", ["sport", "sport/", "sport/tennis"], ["sports", "/sport"]),
        ("#", ["a", "/", "a/b/c"], ["$SYS", "$SYS/uptime", "$"]),
        # 4.7.1.3
        (
            "sport/tennis/+",
            ["sport/tennis/player1", "sport/tennis/player2", "sport/tennis/"],
            ["sport/tennis/player1/ranking", "sport/tennis"],
        ),
        ("sport/+", ["sport/"], ["sport"]),
        ("+/tennis/#", ["sport/tennis", "/tennis/a/b"], ["sport/a/tennis", "$sport/tennis"]),
        (
            "sport/+/player1",
            ["sport/tennis/player1", "sport//player1"],
            ["sport/player1", "sport/a/b/player1"],
        ),
        ("+/+", ["/finance", "a/b"], ["finance", "a/b/c", "$a/b"]),
        ("/+", ["/finance"], ["finance", "//finance"]),
        ("+", ["finance"], ["/finance", "$finance"]),
        # 4.7.2
        ("$SYS/#", ["$SYS", "$SYS/", "$SYS/monitor/Clients"], ["SYS", "a/$SYS"]),
        ("$SYS/monitor/+", ["$SYS/monitor/Clients"], ["$SYS/monitor/a/b"]),
        ("+/monitor/Clients", ["a/monitor/Clients"], ["$SYS/monitor/Clients"]),
        ("a/+/b", ["a/$x/b"], []),
        # 4.7.3: case and leading or trailing slashes matter, and nothing is normalised.
        ("ACCOUNTS", ["ACCOUNTS"], ["Accounts", "ACCOUNTS/", "/ACCOUNTS"]),
        ("Accounts payable", ["Accounts payable"], ["Accounts"]),
        ("/", ["/"], ["a", "//"]),
        # 4.8.2
        ("$share/consumer1/sport/tennis/+", ["sport/tennis/player1"], ["$share/consumer1/sport/tennis/x"]),
        ("$share/g/#", ["a", "a/b"], ["$SYS/uptime"]),
        ("$share/g/$SYS/#", ["$SYS/uptime"], ["a"]),
        ("$share/g//finance", ["/finance"], ["finance"]),
    ],
)
def test_the_examples_of_the_standard(topic_filter: str, matching: list[str], others: list[str]) -> None:
    router = build(topic_filter)
    assert [topic for topic in matching + others if router.match(topic)] == matching
    assert [t for t in matching + others if matches_by_the_standard(topic_filter, t)] == matching


def test_a_filter_and_its_shares_are_entries_of_their_own() -> None:
    router = build("$share/g/a", "a", "$share/h/a")
    assert router.match("a") == ("$share/g/a", "a", "$share/h/a")
    assert router.remove("a").match("a") == ("$share/g/a", "$share/h/a")
    assert router.remove("$share/g/a").match("a") == ("a", "$share/h/a")
    assert router.get("$share/k/a") is None


def test_a_replaced_entry_keeps_its_place_and_one_that_comes_back_does_not() -> None:
    router = build("a", "b").add("a", "new")
    assert list(router) == ["new", "b"]
    assert list(router.remove("a").add("a", "newest")) == ["b", "newest"]


def test_removing_what_is_not_there_changes_nothing() -> None:
    router = build("a/b", "a/+")
    for absent in ("a", "a/b/c", "a/#", "c", "$share/g/a/b"):
        assert router.remove(absent) is router


def test_entries_need_no_more_than_to_exist() -> None:
    """They are neither compared, nor hashed, nor asked whether they are true."""

    class Opaque:
        __hash__ = None  # type: ignore[assignment]

        def _refuse(self, *_: object) -> Any:
            raise AssertionError

        __eq__ = __lt__ = __gt__ = __bool__ = __len__ = _refuse

    first, second = Opaque(), Opaque()
    router = Router[Opaque]().add("+", first).add("a", second).add("a", second)
    assert [entry is expected for entry, expected in zip(router.match("a"), (first, second), strict=True)]
    assert len(list(router.remove("+"))) == 1
    assert router.get("a") is second


@pytest.mark.parametrize("not_a_topic", ["+", "#", "a/+", "a/#", "+/b"])
def test_a_filter_is_no_topic_and_matches_nothing(not_a_topic: str) -> None:
    assert build("a/+", "a/#", "#", "+", "+/b").match(not_a_topic) == ()


def test_a_new_router_does_not_answer_from_the_searches_of_the_old() -> None:
    router = build("a")
    assert router.match("a") == ("a",)
    assert router.add("#", "#").match("a") == ("a", "#")
    assert router.remove("a").match("a") == ()


def test_a_stream_of_ever_new_topics_does_not_grow_the_cache() -> None:
    router = build("#")
    for number in range(2 * router_module._CACHED_SEARCHES + 1):
        assert router.match(f"t/{number}") == ("#",)
    assert 0 < len(router._found) <= router_module._CACHED_SEARCHES


def test_what_is_long_is_not_cached() -> None:
    many = [f"$share/{number}/a" for number in range(router_module._CACHED_ENTRIES + 1)]
    router = build("x/#", *many)
    assert router.match("x/" + "y" * 1000) == ("x/#",)
    assert router.match("a") == tuple(many)
    assert not router._found
    assert router.match("x/y") == ("x/#",)
    assert list(router._found) == ["x/y"]


@pytest.mark.parametrize("topic", ["/" * 65_535, "/".join(["a"] * 32_768)], ids=["slashes", "names"])
def test_no_depth_is_too_deep(topic: str) -> None:
    """The longest topics there are, and filters as deep: the stack bears them, taken apart too."""
    all_plus = "/".join(["+"] * (topic.count("/") + 1))
    router = build(topic, all_plus, topic + "/#", all_plus + "/#", "#", all_plus + "/+")
    assert router.match(topic) == (topic, all_plus, topic + "/#", all_plus + "/#", "#")
    for topic_filter in list(router)[:-1]:
        router = router.remove(topic_filter)
    assert list(router) == [all_plus + "/+"]
    assert router.match(topic) == ()


def test_a_registration_makes_new_nodes_on_its_own_path_only() -> None:
    """However many filters there are: a tree rebuilt for each of ten thousand would take minutes."""
    before = build(*(f"device/{number}/state" for number in range(10_000)))
    after = before.add("device/new/state", "device/new/state")
    known = nodes_in(before)
    made = [node for key, node in nodes_in(after).items() if key not in known]
    assert sorted(len(node.children) for node in made) == [0, 1, 1, 10_001]  # …/state, new, the root, device
    assert len(list(after)) == 10_001
    assert after.match("device/9999/state") == ("device/9999/state",)


def nodes_in(router: Router[str]) -> dict[int, Any]:
    found, waiting = {}, [router._root]
    while waiting:
        node = waiting.pop()
        found[id(node)] = node
        waiting += node.children.values()
    return found
