"""The envelope around every event.

On the wire it is a JSON object of five keys, and of a sixth, ``correlation_id``, only when one was given::

    {"id": "<32 hex digits>", "type": "user.login", "ts": 1729123456.789, "source": "auth", "data": {...}}

What is written can be read back: both directions refuse NaN and infinity, lone surrogates, and more than
``MAX_DEPTH`` levels of nesting. No error message quotes a payload, for payloads do not belong in logs.
"""

from __future__ import annotations

import builtins
import os
import re
import sys
from collections.abc import Hashable
from operator import itemgetter
from time import time as wall_clock
from typing import Any, Literal, TypeVar

import attrs
import ujson

from tars_mqtt.data import MAX_DEPTH, is_bounded, is_plain, json_name, plain, simplify
from tars_mqtt.errors import DecodeError, EncodeError

__all__ = ["CorrelationMode", "Envelope", "encode_event"]

CorrelationMode = Literal["field", "id"]
T = TypeVar("T")


@attrs.frozen(slots=False)
class Envelope:
    """One event as it travels.

    Attributes:
        id: A random UUID in hex. In the old form (``correlation="id"``) the correlation id stands in its place.
        type: What happened, ``user.login`` for instance.
        ts: When the envelope was made, in seconds of Unix time.
        source: Who made it.
        data: What it says, as plain JSON: a dict, list, str, int, float, bool or None.
        correlation_id: What it answers, or belongs to.
    """

    id: str
    type: str
    ts: float
    source: str
    data: Any = attrs.field(hash=False, repr=lambda data: f"<{json_name(data)}>")
    correlation_id: str | None = None

    @classmethod
    def new(
        cls,
        type: str,  # noqa: A002 - the name on the wire
        data: object,
        source: str = "",
        correlation_id: str | None = None,
    ) -> Envelope:
        """Make an envelope with a fresh id and the current time.

        Args:
            type: What happened; not empty.
            data: Anything that :func:`plain` takes. What is plain JSON already is kept, not copied.
            source: Who says so.
            correlation_id: What it answers, or belongs to.

        Raises:
            EncodeError: The data cannot be written as JSON, or another argument is not a string.
        """
        envelope = cls(_new_id(), type, wall_clock(), source, plain(data), correlation_id)
        if problem := _header_problem(envelope._document()):
            raise EncodeError(f"the envelope {problem}", "envelope")
        return envelope

    @classmethod
    def from_bytes(cls, payload: bytes | bytearray | memoryview | str) -> Envelope:
        """Read an envelope. Unknown keys are ignored.

        Raises:
            DecodeError: The payload is not an envelope. There is no payload that raises anything else.
        """
        raw = payload if isinstance(payload, bytes) else _as_bytes(payload)
        try:
            document = ujson.loads(raw)
        except (ValueError, OverflowError, RecursionError, MemoryError) as error:
            reason = (
                str(error)
                if isinstance(error, ujson.JSONDecodeError)
                else "a number or a nesting out of range"
            )
            raise DecodeError(f"the payload of {len(raw)} bytes is not JSON: {reason}") from None
        try:
            envelope_id, event_type, ts, source, data = _HEADER(document)
            correlation_id = document.get("correlation_id")
        except (KeyError, TypeError):
            raise _no_envelope(raw, _header_problem(document)) from None
        # The usual in one condition, without a call; whatever is unusual is looked at again, and named.
        if not (
            ts.__class__ is float
            and -_LARGEST <= ts <= _LARGEST
            and envelope_id.__class__ is event_type.__class__ is source.__class__ is str
            and envelope_id
            and event_type
            and (correlation_id is None or correlation_id.__class__ is str)
        ):
            if problem := _header_problem(document):
                raise _no_envelope(raw, problem)
            document["ts"] = ts = float(ts)
        # Either an escape, or bytes that ujson takes although they are not UTF-8.
        if (0x5C in raw or 0xED in raw) and _SURROGATE(raw) and not _is_encodable(document):
            raise DecodeError(f"the payload of {len(raw)} bytes is not JSON: half of a surrogate pair")
        if not is_bounded(data):
            raise DecodeError(
                f"the data in the payload of {len(raw)} bytes is nested deeper than {MAX_DEPTH} levels, "
                "or holds a number that is no finite double"
            )
        if correlation_id is None:
            document["correlation_id"] = None
        if len(document) > _MOST_KEYS or cls is not Envelope:
            return cls(envelope_id, event_type, ts, source, data, correlation_id)
        # What was read holds the attributes and nothing else: it becomes the envelope's own dict.
        envelope = _new_object(cls)
        _set_dict(envelope, document)
        return envelope

    def to_bytes(self) -> bytes:
        """Write the envelope.

        Raises:
            EncodeError: It cannot be written as JSON.
        """
        document = self._document()
        if problem := _header_problem(document):
            raise EncodeError(f"the envelope {problem}", "envelope")
        return _write(document)

    def data_as(self, model: builtins.type[T]) -> T:
        """Return the data as an instance of *model*.

        Unknown keys are ignored. For attrs classes and dataclasses the types are JSON's, and nothing is
        guessed: a number is not read from a string, nor a list from an object. Dates and times are read from
        ISO 8601, a timedelta from seconds, a Decimal from a string or a number.

        Args:
            model: A pydantic model (whatever has ``model_validate``), an attrs class, a dataclass, or any
                type that `tars_mqtt.model.converter` can structure, ``dict[str, list[int]]`` for instance.

        Raises:
            DecodeError: The data does not fit. The sentence names the field.
        """
        from tars_mqtt.model import fit  # late: a service that takes bytes needs no cattrs

        return fit(self.data, model)

    def dedup_key(self, mode: CorrelationMode) -> Hashable:
        """Return what this envelope has in common with a repetition of itself, and with nothing else.

        That is the id; where correlation ids stand in its place and so repeat on purpose, type and data too.
        """
        if mode == "field":
            return _key_part(self.id)
        text = ujson.dumps(self.data, ensure_ascii=False, sort_keys=True)
        return _key_part(self.id), _key_part(self.type), _digest(text, 16)

    def _document(self) -> dict[str, Any]:
        document = {"id": self.id, "type": self.type, "ts": self.ts, "source": self.source, "data": self.data}
        if self.correlation_id is not None:
            document["correlation_id"] = self.correlation_id
        return document


_MOST_KEYS = len(attrs.fields(Envelope))
_new_object = object.__new__
_set_dict = vars(Envelope)["__dict__"].__set__


def _key_part(text: str) -> str | bytes:
    """Keys are kept for long, and what others write into an envelope may be as large as a message."""
    return text if len(text) <= 128 else _digest(text, 32)


def _digest(text: str, size: int) -> bytes:
    from hashlib import blake2b  # late: it brings OpenSSL along

    return blake2b(text.encode(), digest_size=size).digest()


def encode_event(
    event_type: str,
    data: object,
    source: str,
    correlation_id: str | None = None,
    correlation_mode: CorrelationMode = "field",
) -> tuple[str, bytes]:
    """Return the id and the bytes of a new envelope, without making an :class:`Envelope` on the way.

    Raises:
        EncodeError: The data cannot be written as JSON, or another argument is not a string.
    """
    envelope_id = _new_id()
    document = {"id": envelope_id, "type": event_type, "ts": wall_clock(), "source": source, "data": data}
    if correlation_id is not None:
        if correlation_mode == "field":
            document["correlation_id"] = correlation_id
        elif correlation_id:
            document["id"] = envelope_id = correlation_id
    elif event_type.__class__ is source.__class__ is str and event_type:
        return envelope_id, _write(document)  # the rest is ours, and right
    if problem := _header_problem(document):
        order = "" if isinstance(event_type, str) else ": the order is topic, event_type, data"
        raise EncodeError(f"the envelope {problem}{order}", "envelope")
    return envelope_id, _write(document)


# ensure_ascii, encode_html_chars, escape_forward_slashes, sort_keys, indent and allow_nan: by position, since
# looking up their names takes as long as writing a small envelope.
_AS_IT_IS = (False, False, False, False, 0, False)


def _write(document: dict[str, Any]) -> bytes:
    data = document["data"]
    if not is_plain(data):
        document["data"] = simplify(data)
    try:
        return ujson.dumps(document, *_AS_IT_IS).encode()
    except (TypeError, ValueError, OverflowError):
        # A lone surrogate or an endless integer. The walk says where, unless it is in another key than data.
        simplify(data)
        raise EncodeError(
            "type, source or correlation id holds half of a surrogate pair", "envelope"
        ) from None


_HEADER = itemgetter("id", "type", "ts", "source", "data")
_EXPECTED = {
    "id": "a string that is not empty",
    "type": "a string that is not empty",
    "ts": "a finite number",
    "source": "a string",
    "correlation_id": "a string or null",
}
_LARGEST = sys.float_info.max


def _header_problem(document: Any) -> str | None:
    """Say what is wrong with an envelope, its data apart."""
    if document.__class__ is not dict:
        return f"is {json_name(document)} and not an object"
    try:
        envelope_id, event_type, ts, source, _ = _HEADER(document)
    except KeyError as missing:
        return f"has no key {missing}"
    correlation_id = document.get("correlation_id")
    if not envelope_id or not isinstance(envelope_id, str):
        wrong = "id"
    elif not event_type or not isinstance(event_type, str):
        wrong = "type"
    elif (ts.__class__ is not float and ts.__class__ is not int) or not -_LARGEST <= ts <= _LARGEST:
        wrong = "ts"
    elif not isinstance(source, str):
        wrong = "source"
    elif correlation_id is not None and not isinstance(correlation_id, str):
        wrong = "correlation_id"
    else:
        return None
    return f"has {json_name(document[wrong])} under {wrong!r}, which must be {_EXPECTED[wrong]}"


def _no_envelope(raw: bytes, problem: str | None) -> DecodeError:
    return DecodeError(f"the payload of {len(raw)} bytes is not an envelope: it {problem}")


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]").search


def _is_encodable(document: object) -> bool:
    try:
        ujson.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_bytes(payload: bytearray | memoryview | str) -> bytes:
    if not isinstance(payload, str):
        return bytes(memoryview(payload))
    try:
        return payload.encode()
    except UnicodeEncodeError:
        raise DecodeError(f"the text of {len(payload)} characters holds half of a surrogate pair") from None


# -- ids ------------------------------------------------------------------------------------------

_ids: list[str] = []  # made ahead, since a call of os.urandom costs more than an id
_IDS_AHEAD = 64
_VERSION_4 = bytes(0x40 | byte & 0x0F for byte in range(256))
_VARIANT_1 = bytes(0x80 | byte & 0x3F for byte in range(256))

if hasattr(os, "register_at_fork"):
    # Otherwise parent and child would give out the same ids.
    os.register_at_fork(after_in_child=_ids.clear)


def _new_id() -> str:
    """Return the hex digits of a random UUID (version 4). Any thread: ``list.pop`` hands out each id once."""
    while True:
        try:
            return _ids.pop()
        except IndexError:
            numbers = bytearray(os.urandom(16 * _IDS_AHEAD))
            numbers[6::16] = numbers[6::16].translate(_VERSION_4)
            numbers[8::16] = numbers[8::16].translate(_VARIANT_1)
            _ids.extend(numbers.hex(" ", 16).split())
