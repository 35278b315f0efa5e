"""The data of an event: from Python objects to plain JSON (:func:`plain`), and back to models (:func:`fit`).

Plain JSON is what a JSON reader gives: dict, list, str, int, float, bool and None, and nothing else. Both ways
refuse rather than guess, and no error message quotes a value, for payloads do not belong in logs.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, MutableSequence, MutableSet, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from math import isfinite
from reprlib import repr as shorten
from typing import Any, TypeVar, get_args, get_origin
from uuid import UUID

import attrs
import cattrs
import ujson
from cattrs.cols import list_structure_factory
from cattrs.errors import AttributeValidationNote, ClassValidationError, IterableValidationError
from cattrs.strategies import configure_union_passthrough

from tars_mqtt.errors import DecodeError, EncodeError

T = TypeVar("T")

# Levels of arrays and objects. A handler that walks, copies or compares data by recursion stays far from
# Python's limit.
MAX_DEPTH = 100

converter = cattrs.Converter(unstruct_collection_overrides={AbstractSet: list})
"""Turns objects into plain JSON and back. Register hooks for types of your own before they are first used."""


# -- from Python objects to plain JSON ------------------------------------------------------------

_SCALARS = frozenset({str, int, bool, type(None)})
_ARRAY_LIKE = (list, tuple, set, frozenset, deque)
_BASES: dict[type, Callable[[Any], Any]] = {str: str.__str__, int: int.__int__, float: float.__float__}
_Trail = list[
    tuple[object, object]
]  # from the data inwards: each container, and the key or index taken in it


def plain(data: object) -> Any:
    """Return *data* as plain JSON. What is that already is not copied.

    A Mapping becomes a dict; a tuple, set, frozenset or deque a list. Dates and times become ISO 8601 strings,
    a timedelta its seconds, UUID and Decimal strings, an Enum its value. Pydantic models (whatever has
    ``model_dump``) go through their JSON mode; attrs classes, dataclasses and all else through
    :data:`converter`. A key that is no string is written as its value would be, if that is a scalar.

    Raises:
        EncodeError: Something has no place in JSON: NaN and infinity, bytes, foreign objects, cycles, half of
            a surrogate pair, two keys that become one, more than ``MAX_DEPTH`` levels. It carries the path.
    """
    return data if is_plain(data) else simplify(data)


def is_plain(data: object) -> bool:
    """Whether *data* is plain JSON, finite, and at most ``MAX_DEPTH`` levels deep. Does not look into strings."""
    return _are_plain((data,), MAX_DEPTH)


def _are_plain(values: Iterable[Any], depth: int) -> bool:
    # This must look before ujson does, which writes a Decimal as a float, a tuple used as a key as "(1, 2)",
    # and whatever has __json__ or toDict as these please.
    for value in values:
        kind = type(value)
        if kind in _SCALARS:
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
        elif kind is not list or not depth or not _are_plain(value, depth - 1):
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
    if isinstance(value, _ARRAY_LIKE):
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
    way_out = "base64 can stand for it" if kind is bytes else "tars_mqtt.envelope.converter takes hooks"
    raise _refusal(trail, f"is a {kind.__qualname__}, which JSON cannot carry; {way_out}")


def _refuse_depth(container: object, trail: _Trail) -> None:
    if len(trail) < MAX_DEPTH:
        return
    for level, (outer, _) in enumerate(trail):
        if outer is container:
            raise _refusal(trail[:level], "contains itself")
    raise _refusal(trail, f"is nested deeper than {MAX_DEPTH} levels")


def _refusal(trail: _Trail, problem: str) -> EncodeError:
    path = _path(step for _, step in trail)
    return EncodeError(f"{path} {problem}", path)


def _path(steps: Iterable[object]) -> str:
    """Return ``data.items[3].price``. Keys that are long or no names are shortened."""
    return "data" + "".join(
        f".{step}"
        if isinstance(step, str) and step.isidentifier() and len(step) <= 64
        else f"[{shorten(step)}]"
        for step in steps
    )


# -- from plain JSON to models --------------------------------------------------------------------


def fit(data: Any, model: type[T]) -> T:
    """Return plain *data* as an instance of *model*; see :meth:`Envelope.data_as`.

    Raises:
        DecodeError: The data does not fit. The sentence names the field.
    """
    validate = getattr(model, "model_validate", None)
    try:
        instance: T = validate(data) if callable(validate) else converter.structure(data, model)
    except Exception as error:  # noqa: BLE001 - whatever a validator of the model raises
        # The original may quote the value, so it is not chained.
        problem = _misfit(error)
    else:
        return instance
    name = str(model) if get_args(model) else getattr(model, "__name__", str(model))
    raise DecodeError(f"the data does not fit {name}: {problem}")


def _misfit(error: BaseException) -> str:
    """Say which field of the data is wrong, and how."""
    steps: list[object] = []
    while isinstance(error, ClassValidationError | IterableValidationError):
        noted, others = error.group_exceptions()
        if not noted:
            error = others[0]
            break
        error, note = noted[0]
        steps.append(note.name if isinstance(note, AttributeValidationNote) else note.index)
    reason = f"is refused ({type(error).__name__})"
    if isinstance(error, _MisfitError):
        reason = str(error)
    elif isinstance(error, KeyError) and error.args == tuple(steps[-1:]):
        reason = "is missing"
    elif callable(errors := getattr(error, "errors", None)):  # pydantic
        first = errors()[0]
        steps = first["loc"]
        reason = "is missing" if first["type"] == "missing" else f"is refused ({first['type']})"
    return f"{_path(steps)} {reason}"


class _MisfitError(ValueError):
    """A value is not what the model wants. Its message, unlike those of others, quotes no value."""


_JSON_NAMES = {
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
    return _JSON_NAMES.get(type(value)) or f"a {type(value).__name__}"


def _expect(value: object, *kinds: type) -> None:
    if type(value) not in kinds:
        wanted = " or ".join(dict.fromkeys(_JSON_NAMES[kind] for kind in kinds))
        raise _MisfitError(f"is {json_name(value)} and not {wanted}")


def _read_string(value: Any, kind: Any) -> Any:
    _expect(value, str)
    try:
        return getattr(kind, "fromisoformat", kind)(value)
    except ValueError:
        raise _MisfitError(f"is a string, but no {kind.__name__}") from None


def _read_number(value: Any, kind: Any) -> Any:
    _expect(value, int, float)
    if issubclass(kind, int) and value != int(value):
        raise _MisfitError("is a number and not an integer")
    return kind(value)


def _read_decimal(value: Any, kind: Any) -> Any:
    _expect(value, str, int, float)
    try:
        return _finite(kind(str(value)))  # the shortest digits of a float are the ones that were on the wire
    except ArithmeticError:
        raise _MisfitError(f"is a string, but no {kind.__name__}") from None


def _finite(number: Decimal) -> Decimal:
    if not number.is_finite():
        raise _MisfitError("is no finite number")
    return number


def _read_seconds(value: Any, kind: Any) -> Any:
    _expect(value, int, float)
    return kind(seconds=value)


def _read_unchanged(value: Any, kind: Any) -> Any:
    _expect(value, kind)
    return value


def _read_bytes(value: Any, _: Any) -> Any:
    # By itself, cattrs makes ten billion zero bytes of the number 10000000000.
    raise _MisfitError(f"is {json_name(value)}, and JSON cannot carry bytes")


_ARRAYS: dict[Any, Callable[[Any], Any]] = {
    **{collection: collection for collection in _ARRAY_LIKE},
    Sequence: tuple,
    MutableSequence: list,
    AbstractSet: frozenset,
    MutableSet: set,
}


def _origin(kind: Any) -> Any:
    origin = get_origin(kind)
    return kind if origin is None else origin


def _array_hook(kind: Any, conv: cattrs.Converter) -> Any:
    """Read arrays from arrays only: by itself, cattrs takes whatever can be iterated, a string for its letters."""
    arguments = get_args(kind)
    is_mixed = _origin(kind) is tuple and arguments and arguments[-1] is not Ellipsis
    read = conv.gen_structure_hetero_tuple(kind) if is_mixed else list_structure_factory(kind, conv)
    collect = _ARRAYS[_origin(kind)]

    def read_array(value: Any, _: Any) -> Any:
        _expect(value, list)
        return collect(read(value, kind))

    return read_array


def _object_hook(kind: Any, conv: cattrs.Converter) -> Any:
    """Read classes from objects only: a class full of defaults would otherwise fit an array, too."""
    read = conv.gen_structure_attrs_fromdict(kind)

    def read_object(value: Any, _: Any) -> Any:
        _expect(value, dict)
        return read(value, kind)

    return read_object


def _teach_json() -> None:
    register, register_reader = converter.register_unstructure_hook, converter.register_structure_hook
    for moment in (datetime, date, time):
        register(moment, moment.isoformat)
    register(timedelta, timedelta.total_seconds)
    register(UUID, str)
    register(Decimal, lambda number: str(_finite(number)))
    readers = {
        _read_string: (str, datetime, date, time, UUID),
        _read_number: (int, float),
        _read_unchanged: (bool,),
        _read_decimal: (Decimal,),
        _read_seconds: (timedelta,),
        _read_bytes: (bytes,),
    }
    for reader, kinds in readers.items():
        for kind in kinds:
            register_reader(kind, reader)
    configure_union_passthrough(str | int | float | bool | None, converter)
    converter.register_structure_hook_factory(lambda kind: _origin(kind) in _ARRAYS)(_array_hook)
    converter.register_structure_hook_factory(
        lambda kind: attrs.has(_origin(kind)) or is_dataclass(_origin(kind))
    )(_object_hook)


_teach_json()
