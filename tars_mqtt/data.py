"""The data of an event: from Python objects to plain JSON. The way back is `tars_mqtt.model`.

Plain JSON is what a JSON reader gives: dict, list, str, int, float, bool and None, and nothing else. Both ways
refuse rather than guess, and no error message quotes a value, for payloads do not belong in logs.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from math import isfinite
from reprlib import repr as shorten
from typing import Any

import ujson

from tars_mqtt.errors import EncodeError

# Levels of arrays and objects. A handler that walks, copies or compares data by recursion stays far from
# Python's limit.
MAX_DEPTH = 100

_SCALARS = frozenset({str, int, bool, type(None)})
_NUMBERS = frozenset({int, float, bool})
_MANY = 16
"""Values from which on it pays to ask for all of them at once, and for each only then."""

ARRAY_LIKE = (list, tuple, set, frozenset, deque)
_BASES: dict[type, Callable[[Any], Any]] = {str: str.__str__, int: int.__int__, float: float.__float__}
_Trail = list[
    tuple[object, object]
]  # from the data inwards: each container, and the key or index taken in it


def plain(data: object) -> Any:
    """Return *data* as plain JSON. What is that already is not copied.

    A Mapping becomes a dict; a tuple, set, frozenset or deque a list. Dates and times become ISO 8601 strings,
    a timedelta its seconds, UUID and Decimal strings, an Enum its value. Pydantic models (whatever has
    ``model_dump``) go through their JSON mode; attrs classes, dataclasses and all else through
    the converter of `tars_mqtt.model`. A key that is no string is written as its value would be, if that is a scalar.

    Raises:
        EncodeError: Something has no place in JSON: NaN and infinity, bytes, foreign objects, cycles, half of
            a surrogate pair, two keys that become one, more than ``MAX_DEPTH`` levels. It carries the path.
    """
    return data if is_plain(data) else simplify(data)


def is_plain(data: object) -> bool:
    """Whether *data* is plain JSON, finite, and at most ``MAX_DEPTH`` levels deep. Does not look into strings."""
    if type(data) is dict:  # as it mostly is: one call less
        for key in data:
            if type(key) is not str:
                return False
        return _are_plain(data.values(), MAX_DEPTH - 1)
    return _are_plain((data,), MAX_DEPTH)


def _are_finite(numbers: Collection[Any]) -> bool:
    """Whether all are finite numbers. False where it is not known: their sum may be too large."""
    try:
        return isfinite(sum(numbers))
    except (TypeError, OverflowError):
        return False


def _are_scalars(values: Collection[Any]) -> bool:
    kinds = set(map(type, values))
    return kinds <= _SCALARS or (kinds <= _NUMBERS and _are_finite(values))


def _are_plain(values: Collection[Any], depth: int) -> bool:  # noqa: C901, PLR0911 - in one piece, because calls are what costs
    # This must look before ujson does, which writes a Decimal as a float, a tuple used as a key as "(1, 2)",
    # and whatever has __json__ or toDict as these please.
    if len(values) > _MANY and _are_scalars(values):
        return True
    for value in values:
        kind = type(value)
        if kind is str or kind is int:
            continue
        if kind is float:
            if value - value:  # NaN, which is true, for NaN and the infinities
                return False
        elif kind is dict:
            for key in value:
                if type(key) is not str:
                    return False
            if not depth or not _are_plain(value.values(), depth - 1):
                return False
        elif kind is list:
            if not depth or not _are_plain(value, depth - 1):
                return False
        elif kind is not bool and value is not None:
            return False
    return True


def is_bounded(data: object) -> bool:
    """Whether *data*, which is JSON as it was read, is plain, too: finite, and at most ``MAX_DEPTH`` levels deep."""
    if type(data) is dict:
        return _are_bounded(data.values(), MAX_DEPTH - 1)
    return _are_bounded((data,), MAX_DEPTH)


def _are_bounded(values: Collection[Any], depth: int) -> bool:
    if len(values) > _MANY and _are_finite(values):  # of JSON's values, only numbers have a sum
        return True
    for value in values:
        kind = type(value)
        if kind is str or kind is int:
            continue
        if kind is float:
            if value - value:  # as above
                return False
        elif kind is dict:
            if not depth or not _are_bounded(value.values(), depth - 1):
                return False
        elif kind is list and (not depth or not _are_bounded(value, depth - 1)):
            return False
    return True


def simplify(data: object) -> Any:
    """Do what :func:`plain` does the slow way, which copies, checks every string and number, and knows where."""
    try:
        return _simplify(data, [])
    except RecursionError:
        raise EncodeError("data is nested too deeply, or never becomes plain in the converter") from None


def _simplify(value: Any, trail: _Trail) -> Any:
    kind = type(value)
    if kind in _SCALARS or kind is float:
        return _simplify_scalar(value, trail)
    if isinstance(value, Mapping):
        return _simplify_mapping(value, trail)
    if isinstance(value, ARRAY_LIKE):
        return _simplify_array(value, trail)
    return _simplify(_unstructure(value, trail), trail)


def _simplify_scalar(value: Any, trail: _Trail) -> Any:
    problem = None
    try:
        if type(value) is str:
            value.encode()
        elif type(value) is float and not isfinite(value):
            problem = f"is {value}, which JSON does not know; None can stand for it"
        elif type(value) is int and value.bit_length() > 64:
            str(value)
    except UnicodeEncodeError:
        problem = "holds half of a surrogate pair, which UTF-8 cannot carry"
    except ValueError:
        problem = f"is an integer of more than {sys.get_int_max_str_digits()} digits"
    if problem:
        raise _refusal(trail, problem)
    return value


def _simplify_mapping(mapping: Mapping[Any, Any], trail: _Trail) -> dict[str, Any]:
    _refuse_depth(mapping, trail)
    result: dict[str, Any] = {}
    for key, item in mapping.items():
        trail.append((mapping, key))
        name = _simplify(key, trail)
        if isinstance(name, dict | list):
            raise _refusal(trail, f"has a {type(key).__name__} as its key, and keys of JSON are strings")
        if type(name) is not str:
            name = ujson.dumps(name)
        if name in result:
            raise _refusal(trail, "comes twice: another key is written as the same string")
        result[name] = _simplify(item, trail)
        trail.pop()
    return result


def _simplify_array(array: Iterable[Any], trail: _Trail) -> list[Any]:
    _refuse_depth(array, trail)
    result = []
    for index, item in enumerate(array):
        trail.append((array, index))
        result.append(_simplify(item, trail))
        trail.pop()
    return result


def _unstructure(value: Any, trail: _Trail) -> Any:
    """Return something simpler in place of an object that is neither a scalar nor a container."""
    from tars_mqtt.model import converter  # late: most services publish what is plain already

    kind = type(value)
    try:
        simpler = (
            value.model_dump(mode="json") if hasattr(kind, "model_dump") else converter.unstructure(value)
        )
    except Exception as error:
        problem = f"is a {kind.__qualname__} that does not become plain: {type(error).__name__}"
        raise _refusal(trail, problem) from error
    if type(simpler) is not kind:
        return simpler
    for base, reduce in _BASES.items():
        if isinstance(value, base):
            return reduce(value)
    way_out = "base64 can stand for it" if kind is bytes else "tars_mqtt.model.converter takes hooks"
    raise _refusal(trail, f"is a {kind.__qualname__}, which JSON cannot carry; {way_out}")


def _refuse_depth(container: object, trail: _Trail) -> None:
    if len(trail) < MAX_DEPTH:
        return
    for level, (outer, _) in enumerate(trail):
        if outer is container:
            raise _refusal(trail[:level], "contains itself")
    raise _refusal(trail, f"is nested deeper than {MAX_DEPTH} levels")


def _refusal(trail: _Trail, problem: str) -> EncodeError:
    path = path_of(step for _, step in trail)
    return EncodeError(f"{path} {problem}", path)


def path_of(steps: Iterable[object]) -> str:
    """Return ``data.items[3].price``. Keys that are long or no names are shortened."""
    return "data" + "".join(
        f".{step}"
        if isinstance(step, str) and step.isidentifier() and len(step) <= 64
        else f"[{shorten(step)}]"
        for step in steps
    )


JSON_NAMES = {
    dict: "an object",
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}


def json_name(value: object) -> str:
    """Return what JSON calls such a value."""
    return JSON_NAMES.get(type(value)) or f"a {type(value).__name__}"
