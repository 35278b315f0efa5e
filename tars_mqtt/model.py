"""From plain JSON to models, and the converter that knows how. Imported when it is first needed."""

from __future__ import annotations

from collections.abc import Callable, MutableSequence, MutableSet, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, TypeVar, get_args, get_origin
from uuid import UUID

import attrs
import cattrs
from cattrs.cols import list_structure_factory
from cattrs.errors import (
    AttributeValidationNote,
    ClassValidationError,
    IterableValidationError,
    StructureHandlerNotFoundError,
)
from cattrs.strategies import configure_union_passthrough

from tars_mqtt.data import ARRAY_LIKE, JSON_NAMES, json_name, path_of
from tars_mqtt.errors import DecodeError

__all__ = ["converter", "fit", "is_model"]

T = TypeVar("T")

converter = cattrs.Converter(unstruct_collection_overrides={AbstractSet: list})
"""Turns objects into plain JSON and back. Register hooks for types of your own before they are first used."""


def fit(data: Any, model: type[T]) -> T:
    """Return plain *data* as an instance of *model*; see :meth:`Envelope.data_as`.

    Raises:
        DecodeError: The data does not fit. The sentence names the field.
    """
    validate = getattr(model, "model_validate", None)
    try:
        instance: T = validate(data) if callable(validate) else converter.structure(data, model)
    except Exception as error:
        # The original may quote the value, so it is not chained.
        problem = _misfit(error)
    else:
        return instance
    name = str(model) if get_args(model) else getattr(model, "__name__", str(model))
    raise DecodeError(f"the data does not fit {name}: {problem}")


def is_model(kind: type) -> bool:
    """Whether plain data could become an instance of *kind*; what its fields are does not count."""
    if callable(getattr(kind, "model_validate", None)):
        return True
    try:
        converter.get_structure_hook(kind)
    except StructureHandlerNotFoundError as error:
        return error.type_ is not kind
    except Exception:  # a field's class may be defined, or taught, later
        return True
    return True


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
    return f"{path_of(steps)} {reason}"


class _MisfitError(ValueError):
    """A value is not what the model wants. Its message, unlike those of others, quotes no value."""


def _expect(value: object, *kinds: type) -> None:
    if type(value) not in kinds:
        wanted = " or ".join(dict.fromkeys(JSON_NAMES[kind] for kind in kinds))
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
    **{collection: collection for collection in ARRAY_LIKE},
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
