"""What a value from outside must be, declared once as a type, and the one check of it.

A declaration is a type that mypy reads too: a `TypedDict` (keys that are not in it may stand in the value and are left
alone), ``list[X]``, ``dict[str, X]``, unions, ``Literal``, and ``Annotated[int, Range(1)]`` for a number in a range.
Arrays of an npz are declared by `Array`. A library would do less: msgspec and pydantic take NaN for a number, and name
no key of a mapping in their errors.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol, TypeVar, Union

import numpy as np

from jaxcrit.core.errors import UserError

T = TypeVar("T")
Fault = tuple[tuple[str | int, ...], str, Any]  # where in the value, what was expected there, what is there
MOST_LAYERS = 10_000  # of any model; what is made for each layer before weights are looked at stays small


class _Nothing:
    def __repr__(self) -> str:
        return "nothing"


_ABSENT = _Nothing()
_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxlevel = 60, 60, 40, 4, 3, 3


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number.

    Attributes:
        lowest: least value.
        highest: largest value.
        above: whether the least value itself is excluded.
    """

    lowest: float = -math.inf
    highest: float = math.inf
    above: bool = False

    def fits(self, value: float) -> bool:
        """Whether a number lies in it."""
        return self.lowest <= value <= self.highest and not (self.above and value == self.lowest)

    def words(self, base: str, value: Any) -> str:
        """What is expected; the upper bound is told where it is what a number breaks."""
        if isinstance(value, int | float) and value > self.highest:
            return f"{base} of at most {self.highest:,}"
        if self.lowest == 1 or (self.lowest == 0 and self.above):
            return base.replace("a ", "a positive ", 1)
        return base if self.lowest == -math.inf else f"{base} of {self.lowest:g} or more"


Count = Annotated[int, Range(0, 2**53)]
Size = Annotated[int, Range(1, 2**31 - 1)]
Layers = Annotated[int, Range(1, MOST_LAYERS)]
Positive = Annotated[float, Range(0, above=True)]
AtLeastZero = Annotated[float, Range(0)]


def short(value: Any) -> str:
    """The value as a message shows it, whatever it is and however large."""
    return _SHORT.repr(value)


def conform(value: Any, kind: Any, where: str, advice: str = "", key: str = "") -> Any:
    """The value, which is of a declared kind.

    Args:
        value: JSON, or what a binary file holds in its place.
        kind: declaration, see above.
        where: file, for messages.
        advice: what to do, for messages.
        key: name of the value in the file, for messages.

    Raises:
        UserError: it is of another; the message names file, key, what was expected and what is there.
    """
    fault = _fault(value, kind)
    if fault is None:
        return value
    path, words, found = fault
    key += "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    key = key.removeprefix(".")
    named = f"expected {key} to be {words}" if key else f"expected {words}"
    raise UserError(f"{where}: {named}, got {short(found)}{'; ' if advice else ''}{advice}")


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def _fault(value: Any, kind: Any) -> Fault | None:
    """The first thing that is not as declared."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return None
    if origin is Annotated:
        base, bounds = parts
        wrong = _fault(value, base)
        return ((), bounds.words(_WORDS[base], value), value) if wrong or not bounds.fits(value) else None
    if origin in (Union, types.UnionType):
        return _of_several(value, parts)
    if origin is Literal:
        named = any(type(value) is type(one) and value == one for one in parts)
        return None if named else ((), " or ".join(map(str, parts)), value)
    if origin in (list, dict) or typing.is_typeddict(kind):
        return _of_container(value, kind, origin or dict, parts)
    known = isinstance(value, int | float if kind is float else kind or type(None))
    if known and (kind is bool or not isinstance(value, bool)) and (kind is not float or _finite(value)):
        return None
    return (), _WORDS[kind or type(None)], value


def _of_several(value: Any, kinds: tuple[Any, ...]) -> Fault | None:
    """Of a union: none where one kind fits; else what is wrong inside, if one kind is right on the outside."""
    faults = [_fault(value, one) for one in kinds]
    if None in faults:
        return None
    found = [fault for fault in faults if fault is not None]
    deepest = max(found, key=lambda fault: len(fault[0]))
    words = [fault[1] for fault, one in zip(found, kinds, strict=True) if one not in (None, type(None))]
    return deepest if deepest[0] else ((), " or ".join(words), value)


def _of_container(value: Any, kind: Any, origin: Any, parts: tuple[Any, ...]) -> Fault | None:
    if not isinstance(value, Mapping if origin is dict else origin):
        return (), "a list" if origin is list else "a JSON object", value
    if origin is list and _plainly(value, parts[0]):
        return None
    if origin is list:
        inner: list[tuple[str | int, Any, Any]] = [(place, one, parts[0]) for place, one in enumerate(value)]
    elif parts:
        inner = [(key, one, parts[1]) for key, one in value.items()]
    else:
        hints = _hints(kind)
        for key in sorted(kind.__required_keys__):
            if key not in value:
                return (key,), _expected(hints[key]), _ABSENT
        inner = [(key, value[key], hint) for key, hint in hints.items() if key in value]
    for key, one, hint in inner:
        if fault := _fault(one, hint):
            return (key, *fault[0]), *fault[1:]
    return None


def _plainly(values: Any, kind: Any) -> bool:
    """Whether values are all of a plain type, seen quickly: a vocabulary has hundreds of thousands."""
    return (
        kind in _WORDS and set(map(type, values)) <= {kind} and (kind is not float or all(map(math.isfinite, values)))
    )


def _expected(kind: Any) -> str:
    """Words for a kind, of which nothing is there."""
    fault = _fault(_ABSENT, kind)
    return fault[1] if fault else "there"


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


class Shaped(Protocol):
    """An array, or the header of one that has not been read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""

    @property
    def dtype(self) -> np.dtype:
        """Type of an element."""


ANY = "any"  # size of an axis that is left open


@dataclasses.dataclass(frozen=True)
class Array:
    """What an array must be.

    Attributes:
        kinds: numpy's letters for its dtype: ``f`` float, ``iu`` whole numbers, ``b`` bool, or ``U`` text.
        shape: sizes; a name stands for one size in all arrays of a file, `ANY` for any. None is any shape.
        optional: whether it may be absent.
    """

    kinds: str
    shape: tuple[str | int, ...] | None
    optional: bool = False


def conform_arrays(
    found: Mapping[str, Shaped],
    declared: Mapping[str, Array],
    where: str,
    advice: str = "",
    sizes: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Checks arrays by their headers, before any is read.

    Args:
        found: arrays by name; names that are not declared are left alone.
        declared: what they must be.
        where: file, for messages.
        advice: what to do, for messages.
        sizes: sizes that are known already, by name.

    Returns:
        Size by name.

    Raises:
        UserError: one is absent, of another dtype or shape; the message names it.
    """
    known, front = dict(sizes or {}), f"{where}: " if where else ""
    for name, one in declared.items():
        if name not in found:
            if one.optional:
                continue
            raise UserError(f"{front}has no {name}{'; ' if advice else ''}{advice}")
        array = found[name]
        shape = array.shape if one.shape is None else one.shape
        if len(array.shape) == len(shape):
            shape = tuple(size if part == ANY else part for size, part in zip(array.shape, shape, strict=True))
            for size, part in zip(array.shape, shape, strict=True):
                if isinstance(part, str):
                    known.setdefault(part, size)
        wanted = [known.get(part, part) if isinstance(part, str) else part for part in shape]
        if array.dtype.kind not in one.kinds or list(array.shape) != wanted:
            said = f"{array.dtype} {list(array.shape)}"
            expected = f"{_KINDS[one.kinds]} [{', '.join(map(str, wanted))}]"
            raise UserError(f"{front}expected {name} to be {expected}, got {said}{'; ' if advice else ''}{advice}")
    return known


_KINDS = {"f": "floats", "iu": "whole numbers", "b": "true or false", "U": "texts"}
