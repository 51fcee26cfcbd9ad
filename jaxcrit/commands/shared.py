"""What commands and the Python functions beside them have in common."""

from __future__ import annotations

import functools
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jaxcrit.core import console
from jaxcrit.core.errors import UserError, as_arguments
from jaxcrit.core.options import Options, as_json

if TYPE_CHECKING:
    from jaxcrit.data.facts import Fact
    from jaxcrit.models.model import Model
    from jaxcrit.reporting.report import Report

Function = TypeVar("Function", bound=Callable[..., Any])


def public(function: Function) -> Function:
    """Makes a function of the Python API name arguments where the command names flags."""

    @functools.wraps(function)
    def called(*values: Any, **named: Any) -> Any:
        try:
            return function(*values, **named)
        except UserError as error:
            raise UserError(as_arguments(str(error))) from None

    return called  # type: ignore[return-value]


def opened(options: Any, model: Any = None, role: str = "model", *, mesh: Any = None) -> Model:
    """The model that an option names, or the one given, on the mesh and in the dtype that are asked for.

    One that a caller gives keeps its weights; one that an option names is the command's own, to take apart.

    Args:
        options: options with the field ``role``, and with ``mesh`` and ``dtype``.
        model: a `Model`, or a name that stands for the option's; None for the option.
        role: field that names the model.
        mesh: devices in place of the option's.

    Raises:
        UserError: see `open_model`.
    """
    from jaxcrit.models.model import open_model

    name = getattr(options, role, "") if model is None else model
    how: dict[str, Any] = {"mesh": mesh or options.mesh, "dtype": options.dtype, "keep": model is not None}
    return open_model(name, **how, named=f"--{role}={name}")


def pair(options: Any, roles: tuple[str, str], given: tuple[Any, Any]) -> tuple[Model, Model]:
    """Two models of one shape, vocabulary and dtype, on one mesh; see `opened`.

    Args:
        options: options with both roles as fields.
        roles: fields that name the models.
        given: models, or names, that stand for the options'; None for the option.

    Raises:
        UserError: see `opened` and `check_pair`; or weights of two dtypes.
    """
    from jaxcrit.models.model import check_pair

    first = opened(options, given[0], roles[0])
    both = first, opened(options, given[1], roles[1], mesh=first.mesh)
    check_pair(*both, roles)
    one, other = (model.dtype or model.natural_dtype for model in both)
    if one != other:
        raise UserError(f"--{roles[0]} is in {one}, --{roles[1]} in {other}; give --dtype")
    return both


def facts_of(options: Any, facts: Any = None) -> list[Fact]:
    """The facts that an option names, or those given.

    Args:
        options: options with ``facts``.
        facts: a file, or dicts as in one; None or empty for the option.

    Raises:
        UserError: see `read_facts`.
    """
    from jaxcrit.data.facts import facts_of, read_facts

    if facts is None or isinstance(facts, str | Path):
        return read_facts(str(facts or options.facts))
    return facts_of([(f"facts, row {place}", row) for place, row in enumerate(facts, 1)])


def show(run: Callable[..., Any], report: Callable[[Any], Report], options: Options, *more: Any) -> int:
    """Runs a command with bars, prints its report, and where its page is; returns the exit code of success."""
    from jaxcrit.core.progress import bars

    found = run(options, *more, progress=bars)
    return tell(report(found), found.out)


def tell(report: Report, out: Path | None) -> int:
    """Prints a report, where its page is, and what to do next; returns the exit code of success."""
    from jaxcrit.core.digests import RECORD
    from jaxcrit.core.rundir import read_record

    print(report.text(console.width(), style=console.obeys(sys.stdout)))
    if out is not None:
        console.tell(f"report: {out / 'report.html'}")
        if report.follows and (out / RECORD).exists():
            record = read_record(out)
            tell_next(record.get("command", ""), record.get("config", {}), out, console.tell)
    return 0


def tell_next(
    command: str,
    config: Options | Mapping[str, Any],
    out: Path | str | None,
    say: Callable[[str], None] = console.note,
) -> None:
    """Says what to do after a command, if anything; by default not among its results, which others may read."""
    from jaxcrit.reporting.following import following, told

    values = as_json(config) if isinstance(config, Options) else config
    if steps := following(command, values, str(out or "")):
        say(told(steps))


def say(text: str) -> None:
    """Tells what goes on, on the channel that results do not take."""
    console.tell(textwrap.fill(text, console.width(error=True), subsequent_indent="  "), error=True)


def options_for(kind: type[Options], out: str | Path, given: dict[str, Any]) -> Any:
    """Options of a Python call: unknown names are refused with the nearest that would do.

    Args:
        kind: class of options.
        out: run directory, empty for none.
        given: keyword arguments of the call.

    Raises:
        UserError: an unknown name, or a value that an option refuses.
    """
    from jaxcrit.core.options import from_values

    return from_values(kind, {"out": str(out), **given}, "options")
