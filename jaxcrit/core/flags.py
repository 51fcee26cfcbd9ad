"""Flags as data: one row says name, default and help; parsing and the help page are derived from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from absl import flags

from jaxcrit.core.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        name: without dashes.
        default: its type is the flag's type (str, int, float or bool); None is a bool that may stay open, an empty
            tuple a text that may be given several times.
        help: one line.
        choices: words it may be besides the default, where not free.
        lowest: least whole number.
        word: what stands for the value in the help page.
    """

    name: str
    default: str | int | float | bool | tuple[()] | None
    help: str
    choices: tuple[str, ...] = ()
    lowest: int | None = None
    word: str = "TEXT"


Groups = Mapping[str, tuple[Flag, ...]]


def parse(groups: Groups, command: str, arguments: Sequence[str], positional: Sequence[str] = ()) -> flags.FlagValues:
    """Reads ``--flag=value``, ``--flag value``, ``--flag`` and ``--noflag``.

    Args:
        groups: the flags.
        command: for messages.
        arguments: as given.
        positional: names of flags that words without a flag are the values of, in this order.

    Raises:
        UserError: unknown flag, bad value, or anything that is not a flag; with the nearest that would do.
    """
    values = flags.FlagValues()
    known = [flag for group in groups.values() for flag in group]
    for flag in known:
        if flag.default is None or isinstance(flag.default, bool):
            flags.DEFINE_boolean(flag.name, flag.default, flag.help, flag_values=values)
        elif isinstance(flag.default, int):
            flags.DEFINE_integer(flag.name, flag.default, flag.help, lower_bound=flag.lowest, flag_values=values)
        elif isinstance(flag.default, float):
            flags.DEFINE_float(flag.name, flag.default, flag.help, lower_bound=flag.lowest, flag_values=values)
        elif isinstance(flag.default, tuple):
            flags.DEFINE_multi_string(flag.name, [], flag.help, flag_values=values)
        else:
            flags.DEFINE_string(flag.name, flag.default, flag.help, flag_values=values)
    try:
        stray = values([command, *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        nearest = did_you_mean(error.flagname, [flag.name for flag in known])
        raise UserError(f"{command}: unknown flag --{error.flagname}{nearest}; see jaxcrit {command} --help") from None
    except flags.Error as error:
        raise UserError(f"{command}: {' '.join(str(error).split())}") from None
    if positional and len(stray) == len(positional) and not any(values[name].present for name in positional):
        for name, given in zip(positional, stray, strict=True):
            values[name].value = given
    elif stray and positional:
        words = " ".join(name.upper() for name in positional)
        raise UserError(f"{command}: expected {words}, got {' '.join(stray)}; see jaxcrit {command} --help")
    elif stray:
        hint = f" (did you mean --{stray[0]}?)" if "=" in stray[0] else ""
        raise UserError(f"{command}: expected flags only, got {stray[0]!r}{hint}; write --flag=value")
    for flag in known:
        value = values[flag.name].value
        if flag.choices and value not in (*flag.choices, flag.default):
            nearest = did_you_mean(str(value), flag.choices)
            raise UserError(f"{command}: --{flag.name}={value}: expected {' or '.join(flag.choices)}{nearest}")
    return values


def usage(groups: Groups, command: str, summary: str, positional: Sequence[str] = ()) -> str:
    """The help page: one line per flag with its default, in groups, at most 100 columns wide."""
    words = "".join(f"{name.upper()} " for name in positional)
    lines = [f"jaxcrit {command}: {summary}", "", f"usage: jaxcrit {command} {words}[flags]"]
    for title, group in groups.items():
        lines += ["", f"{title}:"]
        for flag in group:
            if flag.default is None or isinstance(flag.default, bool):
                shown = {None: "", True: "on", False: "off"}
                left, default = f"--[no]{flag.name}", shown[flag.default]
            else:
                word = "|".join(flag.choices) or ("N" if isinstance(flag.default, int | float) else flag.word)
                left, default = f"--{flag.name}={word}", str(flag.default) if flag.default != () else ""
            lines.append(f"  {left:<33} {flag.help}" + (f" [{default}]" if default else ""))
    return "\n".join(lines)
