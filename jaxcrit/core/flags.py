"""From words on a command line to `Options`: absl reads the flags, ``--config=FILE.toml`` gives the rest.

A value on the command line wins over one in the file. ``--flagfile=FILE`` reads flags from a file, a line each.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from jaxcrit.core.errors import UserError, did_you_mean
from jaxcrit.core.files import as_path
from jaxcrit.core.options import Option, Options, options_of
from jaxcrit.core.reading import read_text

CONFIG = "config"
_DEFINE: Mapping[type, Any] = {
    bool: flags.DEFINE_boolean,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
    tuple: flags.DEFINE_multi_string,
}


def read(kinds: Sequence[type[Options]], command: str, arguments: Sequence[str]) -> list[Any]:
    """Reads ``--flag=value``, ``--flag value``, ``--flag`` and ``--noflag``.

    Args:
        kinds: classes of options, the command's own first; no two share a name.
        command: name of the command, for messages.
        arguments: words as given.

    Returns:
        One instance of each class.

    Raises:
        UserError: an unknown flag, a bad value, a word that is no flag, or a file of options that is damaged; with the
            nearest that would do.
    """
    values = flags.FlagValues()
    known = {one.name: one for kind in kinds for one in options_of(kind)}
    for one in known.values():
        default = None if one.kind is tuple else one.default
        _DEFINE[one.kind](one.name, default, one.help, flag_values=values)
    flags.DEFINE_string(CONFIG, "", "options from a TOML file; what is given here wins", flag_values=values)
    try:
        stray = values([command, *_with_files(arguments, command)])[1:]
    except flags.UnrecognizedFlagError as error:
        nearest = did_you_mean(error.flagname, known)
        raise UserError(f"{command}: unknown flag --{error.flagname}{nearest}; see jaxcrit {command} --help") from None
    except flags.IllegalFlagValueError as error:
        found = re.match(r"flag --([\w.]+)=(.*?): ", str(error))
        if found is None or found[1] not in known:
            raise UserError(f"{command}: {' '.join(str(error).split())}") from None
        kind = {int: "a whole number", float: "a number", bool: "true or false"}.get(known[found[1]].kind, "a text")
        raise UserError(f"{command}: --{found[1]}={found[2]}: expected {kind}") from None
    except flags.Error as error:
        raise UserError(f"{command}: {' '.join(str(error).split())}") from None
    except RecursionError:  # absl looks for the nearest name letter by letter
        raise UserError(f"{command}: expected flags, got a word of hundreds of letters before its =") from None
    given = {name: values[name].value for name in known if values[name].present}
    _refuse_slips(arguments, given, known, command)
    given |= _positional(kinds[0].positional, known, stray, given, command)
    file = values[CONFIG].value
    content = _from_file(file, known, command) if file else {}
    try:
        return [kind(**_own(kind, {**content, **given})) for kind in kinds]
    except UserError as error:
        raise UserError(f"{command}: {error}") from None


def _with_files(arguments: Sequence[str], command: str) -> list[str]:
    """The arguments with the lines of a ``--flagfile`` in its place; absl would wait for a pipe, and read without end.

    Raises:
        UserError: no such file, none of text, or one that names another.
    """
    found: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, file = word.partition("=")
        if name.lstrip("-") != "flagfile" or not name.startswith("-"):
            found.append(word)
            continue
        file = file if equals else next(words, "")
        try:
            text = read_text(as_path(file), "flags, a line each")
        except (FileNotFoundError, UserError) as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
            raise UserError(f"{command}: --flagfile={file}: {reason}") from None
        lines = [line.strip() for line in text.splitlines()]
        lines = [line for line in lines if line and not line.startswith(("#", "//"))]
        if any(line.lstrip("-").startswith("flagfile") for line in lines):
            raise UserError(f"{command}: --flagfile={file}: expected flags, got another --flagfile in it; name both")
        found += lines
    return found


def _refuse_slips(
    arguments: Sequence[str], given: Mapping[str, Any], known: Mapping[str, Option], command: str
) -> None:
    """Refuses a flag that is given twice, and a place that is named by nothing, as an unset variable leaves it."""
    words = [word.lstrip("-").partition("=")[0] for word in arguments if word.startswith("--")]
    for name in dict.fromkeys(words):
        if words.count(name) > 1 and name in known and known[name].kind is not tuple:
            commas = "; several go into one, with commas" if name == "data" else ""
            raise UserError(f"{command}: --{name} is given {words.count(name)} times; expected it once{commas}")
    for name, value in given.items():
        one = known[name]
        if value == "" and one.default == "" and re.search("DIR|FILE", one.word):
            raise UserError(
                f"{command}: --{name}= names nothing (an unset variable?); expected {one.word}, or no --{name}"
            )


def _own(kind: type[Options], values: Mapping[str, Any]) -> dict[str, Any]:
    return {one.field: values[one.name] for one in options_of(kind) if one.name in values}


def _positional(
    names: Sequence[str], known: Mapping[str, Option], stray: Sequence[str], given: Mapping[str, Any], command: str
) -> dict[str, Any]:
    """Values of flags that were given as words without one; one that takes several takes them all."""
    if not stray:
        return {}
    if len(names) == 1 and names[0] not in given and known[names[0]].kind is tuple:
        return {names[0]: tuple(stray)}
    if names and len(stray) == len(names) and not any(name in given for name in names):
        return dict(zip(names, stray, strict=True))
    if names:
        words = " ".join(name.upper() for name in names)
        raise UserError(f"{command}: expected {words}, got {' '.join(stray)}; see jaxcrit {command} --help")
    hint = f" (did you mean --{stray[0]}?)" if "=" in stray[0] else ""
    raise UserError(f"{command}: expected flags only, got {stray[0]!r}{hint}; write --flag=value")


def _from_file(file: str, known: Mapping[str, Option], command: str) -> dict[str, Any]:
    """Options of a TOML file; a table ``[KEY]`` holds the options ``KEY.NAME`` of a criterion."""
    path = as_path(file)
    try:
        text = read_text(path, "TOML")
        content = tomllib.loads(text)
    except FileNotFoundError:
        raise UserError(f"--{CONFIG}={file}: no such file; expected options of {command} in TOML") from None
    except UserError as error:
        raise UserError(f"--{CONFIG}={error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--{CONFIG}={file}: expected TOML such as steps = 100, got something else ({error})") from None
    found = {}
    for key, value in _flat(content):
        where = f"{file}, line {_line(text, key)}"
        if key not in known:
            raise UserError(f"{where}: {command} has no option {key!r}{did_you_mean(key, known)}")
        try:
            found[key] = known[key].checked(value)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return found


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return found


def _line(text: str, key: str) -> int:
    """Number of the line that sets a key; of a dotted key, of its last part."""
    last = re.escape(key.rpartition(".")[2])
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(rf"""\s*(?:[\w.]+\.)?["']?{last}["']?\s*=""", line):
            return number
    return 1
