"""``jaxcrit completion SHELL``: what a shell completes the command by, made of the declarations of flags."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from jaxcrit.commands.main import COMMANDS, further
from jaxcrit.core.errors import UserError, did_you_mean
from jaxcrit.core.groups import ProcessOptions
from jaxcrit.core.options import Option, options_of

_BASH = """\
# eval "$(jaxcrit completion bash)", in ~/.bashrc
_jaxcrit() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} flag= flags= values=
  if [[ $word == = ]]; then flag=${{COMP_WORDS[COMP_CWORD-1]}} word=
  elif [[ ${{COMP_WORDS[COMP_CWORD-1]}} == = ]]; then flag=${{COMP_WORDS[COMP_CWORD-2]}}; fi
  if ((COMP_CWORD == 1)) || [[ ${{COMP_WORDS[1]}} == help ]]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$word")); return
  fi
  case ${{COMP_WORDS[1]}} in
{flags}
  esac
  case ${{COMP_WORDS[1]}}$flag in
{values}
  esac
  if [[ -z $flag && $word == -* ]]; then COMPREPLY=($(compgen -W "$flags" -- "$word")); compopt -o nospace
  elif [[ -n $values ]]; then COMPREPLY=($(compgen -W "$values" -- "$word"))
  else COMPREPLY=($(compgen -f -- "$word")); compopt -o filenames; fi
}}
complete -F _jaxcrit jaxcrit
"""
_ZSH = """\
#compdef jaxcrit
# jaxcrit completion zsh > a directory of $fpath/_jaxcrit
_jaxcrit() {{
  local -a flags values
  if ((CURRENT == 2)) || [[ $words[2] == help ]]; then compadd -- {commands}; return; fi
  case $words[2] in
{flags}
  esac
  if compset -P 1 '*='; then
    case $words[2]${{IPREFIX%=}} in
{values}
    esac
    if (($#values)); then compadd -- $values; else _files; fi
  elif [[ $PREFIX == -* ]]; then compadd -S '' -- $flags
  else _files; fi
}}
_jaxcrit "$@"
"""


def script(arguments: Sequence[str]) -> str:
    """The script of a shell.

    Args:
        arguments: ``bash``, ``zsh`` or ``fish``.

    Raises:
        UserError: anything else.
    """
    shells = {"bash": lambda: _filled(_BASH, 'flags="{}"', 'values="{}"'), "fish": _fish}
    shells["zsh"] = lambda: _filled(_ZSH, "flags=({})", "values=({})")
    if len(arguments) != 1 or arguments[0] not in shells:
        given = " ".join(arguments)
        raise UserError(
            f"completion: expected bash, zsh or fish, got {given or 'nothing'}{did_you_mean(given, shells)}"
        )
    return shells[arguments[0]]()


def _options() -> dict[str, list[Option]]:
    """The options of every command."""
    modules = {name: importlib.import_module(module) for name, (module, _) in COMMANDS.items()}
    return {
        name: [one for kind in (module.OPTIONS, *further(module), ProcessOptions) for one in options_of(kind)]
        for name, module in modules.items()
    }


def _filled(text: str, flags: str, values: str) -> str:
    by_flags: list[str] = []
    by_values: list[str] = []
    for name, found in _options().items():
        words = [word for one in found for word in _words(one)]
        by_flags.append(f"    {name}) {flags.format(' '.join(words))};;")
        for one in found:
            if one.choices:
                by_values.append(f"    {name}--{one.name}) {values.format(' '.join(one.choices))};;")
    filled = {"flags": "\n".join(by_flags), "values": "\n".join(by_values)}
    return text.format(commands=" ".join([*COMMANDS, "help", "completion"]), **filled)


def _words(one: Option) -> list[str]:
    """An option as it is typed."""
    return [f"--{one.name}", f"--no{one.name}"] if one.kind is bool else [f"--{one.name}="]


def _fish() -> str:
    lines = ["# jaxcrit completion fish > ~/.config/fish/completions/jaxcrit.fish"]
    for name, (_, summary) in COMMANDS.items():
        for after in ("__fish_use_subcommand", "'__fish_seen_subcommand_from help'"):
            lines.append(f"complete -c jaxcrit -f -n {after} -a {name} -d {_quoted(summary)}")
    lines.append("complete -c jaxcrit -f -n __fish_use_subcommand -a 'help completion'")
    for name, found in _options().items():
        for one in found:
            takes = "" if one.kind is bool else f" -x -a {_quoted(' '.join(one.choices))}" if one.choices else " -r"
            seen = f"complete -c jaxcrit -n '__fish_seen_subcommand_from {name}' -l"
            lines.append(f"{seen} {one.name}{takes} -d {_quoted(one.help)}")
            if one.kind is bool:
                lines.append(f"{seen} no{one.name} -d {_quoted('not: ' + one.help)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
