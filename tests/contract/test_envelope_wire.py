"""The wire format, byte for byte: what other languages and older services rely on."""

from __future__ import annotations

import json
import re
import time

import pytest

from tars_mqtt import Envelope
from tars_mqtt.envelope import encode_event


def test_an_envelope_has_exactly_these_five_keys() -> None:
    before = time.time()
    envelope_id, payload = encode_event("user.login", {"user": "ada"}, "my-service")
    document = json.loads(payload)
    assert list(document) == ["id", "type", "ts", "source", "data"]
    assert document["id"] == envelope_id
    assert re.fullmatch("[0-9a-f]{32}", envelope_id)
    assert document["type"] == "user.login"
    assert before <= document["ts"] <= time.time()
    assert document["source"] == "my-service"
    assert document["data"] == {"user": "ada"}


def test_a_correlation_id_is_a_sixth_key_only_when_given() -> None:
    _, payload = encode_event("t", {}, "s", "request-456")
    assert list(json.loads(payload)) == ["id", "type", "ts", "source", "data", "correlation_id"]
    assert json.loads(payload)["correlation_id"] == "request-456"


def test_both_ways_of_writing_are_the_same() -> None:
    envelope = Envelope.new("t", {"a": [1, None, True, "é"]}, source="s")
    assert json.loads(envelope.to_bytes()) == {
        "id": envelope.id,
        "type": "t",
        "ts": envelope.ts,
        "source": "s",
        "data": {"a": [1, None, True, "é"]},
    }


def test_text_is_utf_8_and_slashes_are_not_escaped() -> None:
    _, payload = encode_event("t", "https://é/☃", "s")
    assert '"data":"https://é/☃"'.encode() in payload


def test_an_envelope_of_the_original_system_is_read() -> None:
    envelope = Envelope.from_bytes(
        b'{"id": "a1b2c3d4e5f6", "type": "event.type", "ts": 1729123456.789, "source": "service-name",'
        b' "data": {"key": "value", "nested": {"data": "here"}}}'
    )
    assert envelope == Envelope(
        "a1b2c3d4e5f6",
        "event.type",
        1729123456.789,
        "service-name",
        {"key": "value", "nested": {"data": "here"}},
    )


@pytest.mark.parametrize("given", [None, "request-1"])
def test_a_reader_that_matches_replies_finds_the_id_either_way(given: str | None) -> None:
    """``correlation_id or id``: true for the old form and the new."""
    for mode in ("field", "id"):
        envelope_id, payload = encode_event("t", {}, "s", given, mode)  # type: ignore[arg-type]
        envelope = Envelope.from_bytes(payload)
        assert (envelope.correlation_id or envelope.id) == (given or envelope_id)
