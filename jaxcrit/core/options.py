"""Options: a field of a frozen dataclass is a flag, an argument, a line of the help page and a row of the docs.

A command declares its options once, as a subclass of `Options`. The command line (`jaxcrit.core.flags`), the checks,
the help page, the table in the docs and ``run.json`` derive from that declaration; Python users get the same checks.
Messages name flags (``--window``); the Python API names arguments instead (`jaxcrit.core.errors.as_argument`).
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from jaxcrit.core.errors import UserError, did_you_mean

_LAST = ("machine",)  # headings that stand below a command's own
_LARGEST = 2**53  # of whole numbers, which JSON and floats hold exactly
_KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Option:
    """What is declared of one option.

    Attributes:
        field: name of the field.
        name: name of the flag and of the key in a file: the field's, behind ``PREFIX.`` where the class has one.
        default: value where none is given; its type is the option's type. None is a switch that may stay open, an
            empty tuple a text that may be given several times.
        help: one line.
        choices: words that it may be besides the default; empty where it is free.
        lowest: least number allowed; None for any.
        above: bound that a number must exceed; None for none.
        highest: largest number allowed; None for any.
        word: what stands for the value on the help page.
        free: why results do not depend on the option; empty where they do.
        group: heading on the help page.
    """

    field: str
    name: str
    default: Any
    help: str
    choices: tuple[str, ...]
    lowest: float | None
    above: float | None
    highest: float | None
    word: str
    free: str
    group: str

    @property
    def kind(self) -> type:
        """Type of a value: str, int, float, bool, or tuple for a text that may be given several times."""
        return bool if self.default is None else type(self.default)

    def checked(self, value: Any) -> Any:
        """The value, converted where that loses nothing.

        A whole number is taken for a float; a path for a text; a list of texts or numbers for a text with commas.

        Raises:
            UserError: a value of another type, outside the bounds, or not among the choices.
        """
        if value == self.default and type(value) is type(self.default):
            return value
        value = self._converted(value)
        shown = f"--{self.name}={value}"
        if self.choices and value not in (*self.choices, self.default):
            nearest = did_you_mean(str(value), self.choices)
            raise UserError(f"{shown}: expected {' or '.join(self.choices)}{nearest}")
        if self.kind in (int, float):
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{shown}: expected a finite number")
            if isinstance(value, int) and abs(value) > _LARGEST:
                raise UserError(f"{shown[:80]}: expected a number up to {_LARGEST:,}")
            if self.lowest is not None and value < self.lowest:
                raise UserError(f"{shown}: expected {self.lowest:g} or more")
            if self.above is not None and value <= self.above:
                raise UserError(f"{shown}: expected a number above {self.above:g}")
            if self.highest is not None and value > self.highest:
                raise UserError(f"{shown}: expected {self.highest:g} or less")
        return value

    def _converted(self, value: Any) -> Any:
        kind = self.kind
        if kind is bool and (isinstance(value, bool) or (value is None and self.default is None)):
            return value
        if kind is str and isinstance(value, os.PathLike):
            return os.fspath(value)
        if kind is str and isinstance(value, list | tuple) and all(isinstance(part, str | int) for part in value):
            return ",".join(map(str, value))
        if kind is tuple and isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
            return tuple(value)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
        expected = "texts" if kind is tuple else _KINDS[kind]
        raise UserError(f"--{self.name}={value!r}: expected {expected}, got {type(value).__name__}")


def option(
    default: Any,
    help: str,
    choices: tuple[str, ...] = (),
    *,
    lowest: float | None = None,
    above: float | None = None,
    highest: float | None = None,
    word: str = "TEXT",
    free: str = "",
    group: str = "",
    name: str = "",
) -> Any:
    """Declares a field of an `Options` class; see `Option` for the arguments. ``name`` is by default the field's."""
    declared = dict(locals())  # what is declared: the arguments
    return dataclasses.field(default=declared.pop("default"), metadata=declared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Base of every set of options. A subclass is a frozen dataclass whose fields are made by `option`.

    ``class RowOptions(Options, title="rows")`` gives the heading under which its own fields stand on help pages,
    ``positional`` names options that may be given as words without their flag, and ``prefix="KEY"`` puts ``KEY.`` in
    front of the flags (the options of a criterion).
    """

    title: ClassVar[str] = ""
    positional: ClassVar[tuple[str, ...]] = ()
    key: ClassVar[str] = ""

    def __init_subclass__(
        cls, title: str = "", positional: tuple[str, ...] = (), prefix: str = "", **others: Any
    ) -> None:
        super().__init_subclass__(**others)
        cls.title, cls.positional, cls.key = title, positional, prefix

    def __post_init__(self) -> None:
        for one in options_of(type(self)):
            object.__setattr__(self, one.field, one.checked(getattr(self, one.field)))
        self.check()

    def check(self) -> None:
        """Checks what depends on several options; a subclass with such rules overrides it.

        Raises:
            UserError: naming the options.
        """


def options_of(kind: type[Options]) -> list[Option]:
    """The options of a class: those of its first base first, its own where their group begins."""
    found = []
    for field in dataclasses.fields(kind):
        bases = [one for one in kind.__mro__ if issubclass(one, Options)]
        origins = [one for one in bases if field.name in vars(one).get("__annotations__", {})]
        group = field.metadata["group"] or origins[-1].title
        name = field.metadata["name"] or field.name
        named = {"name": f"{kind.key}.{name}" if kind.key else name, "group": group}
        found.append(Option(field.name, default=field.default, **{**field.metadata, **named}))
    order = list(_declared(kind))
    return sorted(found, key=lambda one: (one.group in _LAST, order.index(one.field)))


def groups_of(kind: type[Options]) -> dict[str, list[Option]]:
    """The options of a class by heading, in the order of `options_of`."""
    found: dict[str, list[Option]] = {}
    for one in options_of(kind):
        found.setdefault(one.group, []).append(one)
    return found


def _declared(kind: type[Options]) -> Iterator[str]:
    """Names of fields, bases from left to right before the class's own; a name may come more than once."""
    seen: set[str] = set()
    for base in (*kind.__bases__, kind):
        names = vars(kind).get("__annotations__", {}) if base is kind else _declared(base)
        for name in names if issubclass(base, Options) and base is not Options else ():
            if name not in seen:
                seen.add(name)
                yield name


def determining(options: Options) -> dict[str, Any]:
    """The options that results depend on, as JSON values; what a run is told apart by."""
    return {one.name: _json(getattr(options, one.field)) for one in options_of(type(options)) if not one.free}


def as_json(options: Options) -> dict[str, Any]:
    """All options as JSON values, as ``config`` of ``run.json`` holds them."""
    return {one.name: _json(getattr(options, one.field)) for one in options_of(type(options))}


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def from_values(kind: type[Any], values: Mapping[str, Any], where: str) -> Any:
    """Options from a mapping of names to values.

    Args:
        kind: the class of options.
        values: by name; options that are absent keep their default.
        where: what the values were read from, for messages.

    Raises:
        UserError: an unknown name, or a value that an option refuses.
    """
    known = [one.name for one in options_of(kind)]
    for name in values:
        if name not in known:
            raise UserError(f"{where}: unknown option {name!r}{did_you_mean(name, known)}")
    return kind(**{one.field: values[one.name] for one in options_of(kind) if one.name in values})


def table(kind: type[Options]) -> str:
    """The options of a class as a table in Markdown, for the docs."""
    bar = r"\|"  # a bar inside a cell
    rows = ["| option | default | what | changes results |", "| --- | --- | --- | --- |"]
    for one in options_of(kind):
        default = str(one.default)
        if one.kind in (bool, tuple):
            default = {None: "", True: "on", False: "off", (): ""}[one.default]
        value = "" if one.kind is bool else f"={'|'.join(one.choices) or _word(one)}"
        cells = [f"`--{one.name}{value}`", default, one.help, f"no: {one.free}" if one.free else "yes"]
        rows.append(f"| {' | '.join(cell.replace('|', bar) for cell in cells)} |")
    return "\n".join(rows)


def _word(one: Option) -> str:
    return "N" if one.kind in (int, float) else one.word


def usage(
    kind: type[Options],
    command: str,
    summary: str,
    extra: type[Options] | None = None,
    further: Sequence[type[Options]] = (),
    example: str = "",
) -> str:
    """The help page of a command: one line per flag with its default, in groups, at most 100 columns wide.

    Args:
        kind: options of the command.
        command: name of the command.
        summary: what it does, in a line.
        extra: options that every command has, below its own.
        further: options that the command has beside its own.
        example: a command that is common; empty for none.
    """
    several = {one.field for one in options_of(kind) if one.kind is tuple}
    words = "".join(f"{name.upper()}{'...' if name in several else ''} " for name in kind.positional)
    lines = [f"jaxcrit {command}: {summary}", "", f"usage: jaxcrit {command} {words}[flags]"]
    lines += [f"example: {example}"] if example else []
    own = [group for one in (kind, *further) for group in groups_of(one).items()]
    groups = dict(sorted(own, key=lambda group: group[0] in _LAST)) | (groups_of(extra) if extra else {})
    for title, group in groups.items():
        lines += ["", f"{title}:"]
        for one in group:
            if one.kind is bool:
                left, default = f"--[no]{one.name}", {None: "", True: "on", False: "off"}[one.default]
            else:
                left = f"--{one.name}={'|'.join(one.choices) or _word(one)}"
                default = str(one.default) if one.default != () else ""
            lines.append(f"  {left:<33} {one.help}" + (f" [{default}]" if default else ""))
    return "\n".join(lines)
