"""Values of a request, made arrays of the types that the model's signature names; errors name the field."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flops.serving.errors import RefusedError
from flops.serving.question import Array
from flops.serving.signature import Field

_SHOWN = 40


def column(values: Sequence[Any], field: Field) -> Array | list[Any]:
    """The values of one column, one each row.

    Raises:
        RefusedError: one of them is not of the column's type.
    """
    if field.dtype is None:
        values = list(values)
        if not all(value is None or isinstance(value, str) for value in values):
            raise _wrong("column", values, field)
        return values
    array = numbers("column", values, field)
    if array.ndim != 1:
        raise RefusedError(
            f"column '{field.name}' holds lists - send one value of type {field.kind} for each row"
        )
    return array


def tensor(value: Any, field: Field) -> Array:
    """The values of one tensor, from nested lists.

    Raises:
        RefusedError: a value has another type, or the whole has another shape.
    """
    return shaped(numbers("input", value, field), field)


def shaped(array: Array, field: Field) -> Array:
    """The array itself, if it has the field's shape; else RefusedError."""
    shape = array.shape
    if len(shape) != len(field.shape) or any(
        size not in (-1, given) for size, given in zip(field.shape, shape, strict=True)
    ):
        wanted = ", ".join("any" if size < 0 else str(size) for size in field.shape)
        given = ", ".join(map(str, shape))
        raise RefusedError(f"input '{field.name}' has shape ({given}), the model takes ({wanted})")
    return array


def converted(what: str, array: Array, field: Field) -> Array:
    """The array in the field's type, if no value changes but by rounding of fractions; else RefusedError."""
    dtype = field.dtype
    assert dtype is not None
    if array.dtype == dtype or not array.size:
        return array.astype(dtype, copy=False)
    if (array.dtype.kind == "b") is (dtype.kind == "b") and array.dtype.kind in "fiub":
        with np.errstate(invalid="ignore", over="ignore"):
            result = array.astype(dtype)
        if dtype.kind == "f" or bool((result == array).all()):
            return result
    raise _wrong(what, array.tolist(), field)


def numbers(what: str, value: Any, field: Field) -> Array:
    """Nested lists of numbers as an array of the field's type, of any shape; else RefusedError."""
    dtype = field.dtype
    assert dtype is not None
    try:
        array: Array = np.asarray(value)
        if array.dtype.kind in "fiub":
            return converted(what, array, field)
        if array.dtype.kind == "O" and dtype.kind == "f" and _first_wrong(value, _taken_by(field)) is None:
            with np.errstate(over="ignore"):
                return np.array(value, dtype)  # null is NaN, and too large for the type infinite
    except (ValueError, OverflowError):
        pass
    raise _wrong(what, value, field)


def _wrong(what: str, value: Any, field: Field) -> RefusedError:
    """The error that says which value it is."""
    found = _first_wrong(value, _taken_by(field))
    if found is None:
        return RefusedError(f"{what} '{field.name}' holds lists of different lengths, or too large numbers")
    at, leaf = found
    where = f"row {at[0]}" + "".join(f"[{index}]" for index in at[1:]) if at else "it"
    shown = "null" if leaf is None else repr(leaf) if not isinstance(leaf, dict) else "an object"
    shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "..."
    return RefusedError(f"{what} '{field.name}' takes {field.kind}, {where} holds {shown}")


def _first_wrong(value: Any, takes: Callable[[Any], bool]) -> tuple[tuple[int, ...], Any] | None:
    """The first value in nested lists that is not taken, and where it is."""
    waiting: list[tuple[tuple[int, ...], Any]] = [((), value)]
    while waiting:
        at, one = waiting.pop()
        if isinstance(one, list | tuple):
            waiting.extend(((*at, index), one[index]) for index in reversed(range(len(one))))
        elif not takes(one):
            return at, one
    return None


def _taken_by(field: Field) -> Callable[[Any], bool]:
    dtype = field.dtype
    if dtype is None:
        return lambda value: value is None or isinstance(value, str)
    if dtype.kind == "b":
        return lambda value: isinstance(value, bool)
    if dtype.kind == "f":
        return lambda value: value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    limits = np.iinfo(dtype)

    def whole(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return value == value // 1 and limits.min <= value <= limits.max

    return whole
