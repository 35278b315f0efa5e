"""`Envelope` and the data in it: what goes out, what is refused and where, what comes in."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import enum
import json
import os
import threading
import time
import uuid
from collections import deque
from decimal import Decimal
from types import MappingProxyType
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from tars_mqtt import DecodeError, EncodeError, Envelope
from tars_mqtt.envelope import encode_event
from tars_mqtt.model import converter


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


@attrs.frozen
class Reading:
    name: str
    value: float
    tags: tuple[str, ...] = ()


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Person(BaseModel):
    name: str
    born: datetime.date | None = None


class Foreign:
    pass


class Pretender:
    """ujson would take these at their word."""

    def __json__(self) -> str:
        return '"pretended"'

    def toDict(self) -> dict[str, str]:  # noqa: N802
        return {"pretended": "yes"}


def sent(data: object) -> Any:
    return json.loads(encode_event("t", data, "s")[1])["data"]


# -- ids ------------------------------------------------------------------------------------------


def test_ids_are_random_uuids_in_hex() -> None:
    ids = [Envelope.new("t", None).id for _ in range(1000)]
    assert len(set(ids)) == 1000
    for each in ids:
        assert uuid.UUID(each).version == 4
        assert uuid.UUID(each).variant == uuid.RFC_4122
        assert each == uuid.UUID(each).hex


def test_threads_never_get_the_same_id() -> None:
    ids: list[str] = []

    def make() -> None:
        ids.extend(Envelope.new("t", None).id for _ in range(2000))

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 8000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_does_not_repeat_the_parents_ids() -> None:
    Envelope.new("t", None)
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.write(writing, Envelope.new("t", None).id.encode())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(reading, 100).decode()
    os.close(reading)
    os.close(writing)
    assert theirs not in {Envelope.new("t", None).id for _ in range(500)}


# -- data that goes out ------------------------------------------------------------------------------


MOMENT = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("data", "written"),
    [
        (None, None),
        (True, True),
        (12, 12),
        (1.5, 1.5),
        ("é/☃", "é/☃"),
        ([1, [2]], [1, [2]]),
        ((1, 2), [1, 2]),
        ({3}, [3]),
        (deque([1]), [1]),
        (MappingProxyType({"a": 1}), {"a": 1}),
        ({2: "a", None: "b", True: "c"}, {"2": "a", "null": "b", "true": "c"}),
        (Decimal("1.10"), "1.10"),
        (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        (Colour.RED, "red"),
        ({"level": Level.HIGH}, {"level": 3}),
        (MOMENT, "2026-01-02T03:04:05+00:00"),
        (MOMENT.date(), "2026-01-02"),
        (datetime.timedelta(minutes=1), 60.0),
        (Reading("a", 1.5, ("x",)), {"name": "a", "value": 1.5, "tags": ["x"]}),
        ([Point(1)], [{"x": 1, "y": 0}]),
        (Person(name="Ada", born=MOMENT.date()), {"name": "Ada", "born": "2026-01-02"}),
    ],
    ids=repr,
)
def test_data_is_written_as_json_users_expect(data: object, written: object) -> None:
    assert sent(data) == written
    assert Envelope.new("t", data).data == written


def cyclic() -> list[Any]:
    data: list[Any] = [1]
    data.append({"again": data})
    return data


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ({"a": [1, {"price": float("nan")}]}, "data.a[1].price"),
        ([float("-inf")], "data[0]"),
        ({"raw": b"bytes"}, "data.raw"),
        ({"who": Foreign()}, "data.who"),
        ({"who": Pretender()}, "data.who"),
        ({(1, 2): 3}, "data[(1, 2)]"),
        ({1: "a", "1": "b"}, "data['1']"),
        ("\ud800", "data"),
        ({"text": ["ok", "\udfff"]}, "data.text[1]"),
        (cyclic(), "data"),
        ({"n": Decimal("NaN")}, "data.n"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("data") else "",
)
def test_what_json_cannot_carry_is_refused_and_the_path_named(data: object, path: str) -> None:
    for write in (lambda: encode_event("t", data, "s"), lambda: Envelope.new("t", data).to_bytes()):
        with pytest.raises(EncodeError) as caught:
            write()
        assert caught.value.path == path
        assert path in str(caught.value)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), b"bytes", Foreign(), Pretender()])
@pytest.mark.parametrize("right", [0.5, 1, True, None, "x", [1.5]], ids=repr)
def test_one_wrong_value_among_many_is_found(wrong: object, right: object) -> None:
    data = [right] * 500
    data[321] = wrong
    for values in (data, dict(zip(map(str, range(500)), data, strict=True))):
        with pytest.raises(EncodeError) as caught:
            encode_event("t", {"values": values}, "s")
        assert "321" in caught.value.path


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (1e308, 1e308),
        (-1.5, -1.5),
        (10**400, 10**400),
        (True, True),
        (Decimal("0.5"), "0.5"),
        (Level.HIGH, 3),
    ],
    ids=repr,
)
@pytest.mark.parametrize("other", [1.5, 2, "x"])
def test_many_values_are_written_and_read_as_one_is(value: object, written: object, other: object) -> None:
    """Also where their sum is too large for a double."""
    data = [value, other] * 50
    assert sent(data) == [written, other] * 50


def test_depth_is_bounded_and_says_so() -> None:
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(EncodeError, match="nested deeper than 100 levels"):
        encode_event("t", deep, "s")


def test_a_type_that_the_converter_was_taught_is_written() -> None:
    class Celsius:
        def __init__(self, degrees: float) -> None:
            self.degrees = degrees

    converter.register_unstructure_hook(Celsius, lambda value: {"celsius": value.degrees})
    assert sent([Celsius(21.5)]) == [{"celsius": 21.5}]


@pytest.mark.parametrize("event_type", ["", None, 5])
def test_a_type_that_is_no_name_is_refused(event_type: Any) -> None:
    with pytest.raises(EncodeError, match="'type'"):
        encode_event(event_type, {}, "s")


def test_data_in_place_of_the_type_is_told_the_order() -> None:
    with pytest.raises(
        EncodeError, match="has an object under 'type'.*: the order is topic, event_type, data"
    ):
        encode_event({"celsius": 21.5}, "reading.taken", "s")  # type: ignore[arg-type]


@pytest.mark.parametrize("correlation_id", [None, "c"])
def test_a_source_that_is_no_string_is_refused(correlation_id: str | None) -> None:
    with pytest.raises(EncodeError, match="'source'"):
        encode_event("t", {}, None, correlation_id)  # type: ignore[arg-type]


# -- the old form ---------------------------------------------------------------------------------


def test_the_old_form_puts_the_correlation_id_in_place_of_the_id() -> None:
    envelope_id, payload = encode_event("t", {}, "s", "request-1", "id")
    assert envelope_id == "request-1"
    assert "correlation_id" not in json.loads(payload)


def test_ids_that_repeat_on_purpose_are_told_apart_by_type_and_data() -> None:
    one = Envelope("request-1", "asked", 1.0, "s", {"n": 1})
    assert one.dedup_key("id") == Envelope("request-1", "asked", 2.0, "x", {"n": 1}).dedup_key("id")
    assert one.dedup_key("id") != Envelope("request-1", "asked", 1.0, "s", {"n": 2}).dedup_key("id")
    assert one.dedup_key("id") != Envelope("request-1", "answered", 1.0, "s", {"n": 1}).dedup_key("id")
    assert one.dedup_key("field") == "request-1"


@pytest.mark.parametrize("mode", ["field", "id"])
def test_a_key_is_small_however_large_the_envelope_is(mode) -> None:
    """Deduplication keeps many of them for long; and two that are long are told apart all the same."""
    long = "x" * 1_000_000
    keys = {Envelope(long + end, long, 1.0, "s", long).dedup_key(mode) for end in "abb"}
    assert len(keys) == 2
    assert all(len(repr(key)) < 1000 for key in keys)


# -- what comes in --------------------------------------------------------------------------------


def document(**changes: object) -> bytes:
    good = {"id": "1", "type": "t", "ts": 1.5, "source": "s", "data": {}}
    return json.dumps({**good, **changes}).encode()


def test_unknown_keys_are_ignored() -> None:
    assert Envelope.from_bytes(document(later="version")).id == "1"


@pytest.mark.parametrize("missing", ["id", "type", "ts", "source", "data"])
def test_a_missing_key_is_named(missing: str) -> None:
    values = json.loads(document())
    del values[missing]
    with pytest.raises(DecodeError, match=missing):
        Envelope.from_bytes(json.dumps(values))


WRONG: list[Any] = [None, True, 5, 1.5, "", [], {}]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("id", value) for value in WRONG),
        *(("type", value) for value in WRONG),
        *(("ts", value) for value in (None, True, "1", [], {})),
        *(("source", value) for value in (None, True, 5, [], {})),
        *(("correlation_id", value) for value in (True, 5, [], {})),
    ],
)
def test_a_wrong_type_is_named(key: str, value: object) -> None:
    with pytest.raises(DecodeError, match=key):
        Envelope.from_bytes(document(**{key: value}))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"id"',
        document() + b"x",
        document(data="PLACE").replace(b'"PLACE"', b"NaN"),
        document(data="PLACE").replace(b'"PLACE"', b"1e999"),
        document(data=[1.5] * 100 + ["PLACE"]).replace(b'"PLACE"', b"NaN"),
        document(data=[1, 1e308] * 100 + ["PLACE"]).replace(b'"PLACE"', b"-1e999"),
        document(ts="PLACE").replace(b'"PLACE"', b"-Infinity"),
        document(data="PLACE").replace(b'"PLACE"', b"1" * 100_000),
        document(data="PLACE").replace(b'"PLACE"', b"[" * 100_000),
        document(data="PLACE").replace(b'"PLACE"', b"[" * 500 + b"]" * 500),
        document(data="\ud800"),
        document(id="\udfff"),
        document(data="PLACE").replace(b"PLACE", b"\xed\xa0\x80"),
    ],
    ids=lambda payload: repr(payload[:20]),
)
def test_hostile_payloads_are_refused_without_being_quoted(payload: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        Envelope.from_bytes(payload)
    assert len(str(caught.value)) < 250


def test_ten_megabytes_of_noise_are_refused_at_once() -> None:
    noise = os.urandom(10_000_000)
    started = time.process_time()
    with pytest.raises(DecodeError):
        Envelope.from_bytes(noise)
    assert time.process_time() - started < 2


@given(st.binary(max_size=300))
def test_no_bytes_do_anything_but_decode_or_be_refused(payload: bytes) -> None:
    with contextlib.suppress(DecodeError):
        Envelope.from_bytes(payload)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=20,
)


@given(PLAIN)
def test_what_is_written_is_read_back(data: object) -> None:
    envelope = Envelope.new("t", data, source="s", correlation_id="c")
    assert Envelope.from_bytes(envelope.to_bytes()) == envelope


# -- models ---------------------------------------------------------------------------------------


def test_data_becomes_a_model() -> None:
    assert Envelope.new("t", {"name": "a", "value": 1}).data_as(Reading) == Reading("a", 1.0)
    assert Envelope.new("t", {"x": 1, "later": True}).data_as(Point) == Point(1)
    assert Envelope.new("t", {"name": "Ada"}).data_as(Person) == Person(name="Ada")


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (Reading, {"value": 1}, "data.name is missing"),
        (Reading, {"name": 5, "value": 1}, "data.name is a number and not a string"),
        (Reading, {"name": "a", "value": "high"}, "data.value is a string and not a number"),
        (Point, [1, 2], "is an array and not an object"),
        (Person, {}, "data.name is missing"),
        (Point, "secret", "is a string and not an object"),
    ],
)
def test_data_that_does_not_fit_is_refused_naming_the_field(model: Any, data: object, words: str) -> None:
    with pytest.raises(DecodeError) as caught:
        Envelope.new("t", data).data_as(model)
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)
