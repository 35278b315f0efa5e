"""Topics and filters: what the standard allows, and which filter matches which topic."""

from __future__ import annotations

import enum

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from tars_mqtt.errors import TopicError
from tars_mqtt.topics import check_filter, check_topic, matches, split_share, topic_bytes

MAX_BYTES = 65_535


class Hostile(str):
    """A str that lies about itself."""

    __slots__ = ()

    def __str__(self) -> str:
        raise AssertionError

    def __eq__(self, other: object) -> bool:
        raise AssertionError

    def __hash__(self) -> int:
        raise AssertionError


class Topic(str, enum.Enum):  # noqa: UP042 (a StrEnum formats as its value, this one as its name)
    LOGIN = "events/login"


@pytest.mark.parametrize(
    "topic",
    [
        "a",
        "/",
        "//",
        "/a/",
        " ",
        "a b",
        "$SYS/broker/uptime",
        "$share/group/a",
        "events/größe/☃/\U0001f600",
        "\ufeffa",  # [MQTT-1.5.4-3]: not a byte order mark, and not to be stripped
        "a\x01\x7f\x85b",
        "\ufffe\U0001ffff",
        "x" * MAX_BYTES,
        "é" * (MAX_BYTES // 2),
    ],
)
def test_a_topic_that_the_standard_allows_comes_back_as_it_is(topic: str) -> None:
    assert check_topic(topic) == topic
    assert topic_bytes(topic) == topic.encode()
    assert check_filter(topic) == topic, "a topic is a filter, too"


@pytest.mark.parametrize("several", [["a", "b"], ("a", 1)])
def test_several_filters_in_one_are_met_with_the_way_out(several: object) -> None:
    with pytest.raises(TopicError, match="not (list|tuple): subscribe to one at a time"):
        check_filter(several)


@pytest.mark.parametrize("check", [check_topic, topic_bytes, check_filter])
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("", "empty"),
        ("a\0b", "U+0000"),
        ("a\ud800", "surrogate"),
        ("\udcff", "surrogate"),
        ("x" * (MAX_BYTES + 1), "65,536 bytes"),
        ("é" * (MAX_BYTES // 2 + 1), "65,536 bytes"),
        (None, "must be a str, not NoneType"),
        (b"a/b", "must be a str, not bytes"),
        (7, "must be a str, not int"),
        ([], "must be a str, not list"),
        ({}, "must be a str, not dict"),
    ],
)
def test_what_is_no_topic_and_no_filter_is_refused_with_its_reason(check, wrong: object, words: str) -> None:
    for _ in range(2):  # the second time as well as the first: a refusal is not remembered as a pass
        with pytest.raises(TopicError) as caught:
            check(wrong)
        assert words in str(caught.value)
        assert len(str(caught.value)) < 600, "a long topic is quoted in part"


@pytest.mark.parametrize("check", [check_topic, topic_bytes])
@pytest.mark.parametrize("topic", ["+", "#", "a/+", "a/#", "a+", "a#b", "$share/g/+"])
def test_a_wildcard_is_refused_in_a_topic(check, topic: str) -> None:
    with pytest.raises(TopicError, match="wildcard"):
        check(topic)


def test_a_str_subclass_is_taken_by_its_characters() -> None:
    for text in (check_topic(Hostile("a/b")), check_filter(Hostile("a/b"))):
        assert type(text) is str
        assert text == "a/b"
    assert type(check_topic(Topic.LOGIN)) is str
    assert check_topic(Topic.LOGIN) == "events/login"
    assert topic_bytes(Topic.LOGIN) == b"events/login"


@given(st.text())
def test_any_text_is_a_topic_or_a_topic_error(text: str) -> None:
    try:
        checked = check_topic(text)
    except TopicError:
        assert not text or any(c in "+#\0" or "\ud800" <= c <= "\udfff" for c in text)
    else:
        assert checked == text
        assert topic_bytes(text).decode() == text
        assert not set(text) & {"+", "#", "\0"}


@pytest.mark.parametrize(
    "topic_filter",
    [
        "#",
        "+",
        "sport/tennis/player1/#",
        "sport/#",
        "+/tennis/#",
        "sport/+/player1",
        "/+",
        "+/+",
        "a//#",
        "$SYS/#",
        "$SYS/monitor/+",
        "$share",
        "$sharing/a",
        "$share/consumer/sport/tennis/+",
        "$share/g//a",
        "$share/g/#",
        "$share/g//",
    ],
)
def test_a_filter_that_the_standard_allows_comes_back_as_it_is(topic_filter: str) -> None:
    assert check_filter(topic_filter) == topic_filter


@pytest.mark.parametrize(
    ("topic_filter", "words"),
    [
        ("sport/tennis#", "whole level"),
        ("sport/tennis/#/ranking", "last"),
        ("#/a", "last"),
        ("#/#", "last"),
        ("sport+", "whole level"),
        ("++", "whole level"),
        ("a/+b/c", "whole level"),
        ("+#", "whole level"),
        ("##", "whole level"),
        ("$share/", "no group"),
        ("$share//a", "no group"),
        ("$share/g", "no filter after its group"),
        ("$share/g/", "no filter after its group"),
        ("$share/+/a", "wildcard in its group"),
        ("$share/g#/a", "wildcard in its group"),
        ("$share/g/a#", "whole level"),
        ("$share/g/#/a", "last"),
    ],
)
def test_a_filter_that_the_standard_forbids_is_refused_with_its_reason(topic_filter: str, words: str) -> None:
    with pytest.raises(TopicError) as caught:
        check_filter(topic_filter)
    assert words in str(caught.value)


def test_the_length_of_a_shared_filter_counts_as_a_whole() -> None:
    longest = "$share/g/" + "x" * (MAX_BYTES - len("$share/g/"))
    assert check_filter(longest) == longest
    with pytest.raises(TopicError, match="65,536 bytes"):
        check_filter(longest + "x")


@pytest.mark.parametrize(
    ("topic_filter", "parts"),
    [
        ("a/b", (None, "a/b")),
        ("$SYS/#", (None, "$SYS/#")),
        ("$share", (None, "$share")),
        ("$sharing/g/a", (None, "$sharing/g/a")),
        ("$share/g/a/b", ("g", "a/b")),
        ("$share/g//a", ("g", "/a")),
        ("$share/g/$SYS/#", ("g", "$SYS/#")),
    ],
)
def test_the_group_of_a_shared_filter_is_split_off(topic_filter: str, parts: tuple[str | None, str]) -> None:
    assert split_share(topic_filter) == parts


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("sport/tennis/player1/#", "sport/tennis/player1", True),
        ("sport/tennis/player1/#", "sport/tennis/player1/ranking", True),
        ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", True),
        ("sport/tennis/player1/#", "sport/tennis/player2", False),
        ("sport/#", "sport", True),
        ("sport/#", "sports", False),
        ("#", "sport", True),
        ("#", "/", True),
        ("sport/tennis/+", "sport/tennis/player1", True),
        ("sport/tennis/+", "sport/tennis/player1/ranking", False),
        ("sport/+", "sport", False),
        ("sport/+", "sport/", True),
        ("+/+", "/finance", True),
        ("/+", "/finance", True),
        ("+", "/finance", False),
        ("#", "$SYS/monitor/Clients", False),
        ("+/monitor/Clients", "$SYS/monitor/Clients", False),
        ("+/#", "$SYS", False),
        ("$SYS/#", "$SYS/monitor/Clients", True),
        ("$SYS/#", "$SYS", True),
        ("$SYS/monitor/+", "$SYS/monitor/Clients", True),
        ("a/+", "a/$b", True),
        ("ACCOUNTS", "Accounts", False),
        ("/finance", "finance", False),
        ("a/b", "a/b/", False),
        ("a//b", "a//b", True),
        ("a/+/b", "a//b", True),
        ("a/b", "a//b", False),
        ("a/+/#", "a", False),
        ("a/+/#", "a/b", True),
        ("\ufeffa", "a", False),
    ],
)
def test_a_filter_matches_as_in_the_examples_of_the_standard(
    topic_filter: str, topic: str, expected: bool
) -> None:
    """Sections 4.7.1 to 4.7.3."""
    assert matches(topic_filter, topic) is expected
    assert matches(f"$share/group/{topic_filter}", topic) is expected, "sharing changes nothing [MQTT-4.8.2]"


def test_a_shared_filter_does_not_match_the_topic_that_is_spelled_like_it() -> None:
    assert not matches("$share/g/a", "$share/g/a")
    assert matches("$sharing/g/a", "$sharing/g/a")


LEVELS = st.sampled_from(["", "a", "b", "ab", "$", "$SYS", "$share", " "])
TOPICS = st.lists(LEVELS, min_size=1, max_size=5).map("/".join).filter(bool)


@st.composite
def filters(draw: st.DrawFn) -> str:
    levels = draw(st.lists(st.one_of(st.just("+"), LEVELS), max_size=5))
    if not levels or draw(st.booleans()):
        levels.append("#")
    return "/".join(levels)


@given(filters().filter(bool), TOPICS)
@example("+/+", "/")
@example("a/#", "a")
def test_unshared_filters_match_as_paho_matches_them(topic_filter: str, topic: str) -> None:
    """Paho is right about all but ``$share/``, of which it does not know."""
    if not topic_filter.startswith("$share/"):
        assert check_filter(topic_filter) == topic_filter
        assert matches(topic_filter, topic) is topic_matches_sub(topic_filter, topic)


@given(TOPICS, st.data())
def test_a_topic_matches_whatever_of_its_levels_became_a_wildcard(topic: str, data: st.DataObject) -> None:
    levels = topic.split("/")
    first = 1 if topic.startswith("$") else 0
    for index in range(first, len(levels)):
        if data.draw(st.booleans()):
            levels[index] = "+"
    if len(levels) > first and data.draw(st.booleans()):
        levels[data.draw(st.integers(max(first, 1), len(levels))) :] = ["#"]
    topic_filter = "/".join(levels)
    assert matches(f"$share/g/{topic_filter}", topic)
