"""The one exception a user's mistake raises, and the did-you-mean that goes with it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

_LONGEST = 2000  # letters of a message


class UserError(ValueError):
    """A mistake in what the user gave: files, flags or data.

    The message is one line: what was expected, what came, where, what to do. The command prints it
    without a traceback and exits with 2. Line breaks of what it quotes are written out; of a message that quotes
    pages, the beginning and the end are kept.
    """

    def __init__(self, message: str):
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} [...] {message[-_LONGEST // 2 :]}"
        super().__init__(message.replace("\r", "\\r").replace("\n", "\\n"))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ``" (did you mean 'x'?)"`` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def listed(items: Sequence[object], limit: int = 8) -> str:
    """Joins items for an error message: all of a short list, the first of a long one and a count."""
    shown = ", ".join(str(item) for item in items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


def is_error(error: BaseException) -> bool:
    """Whether something went wrong; Ctrl-C and exits are no errors, a panic of a library in Rust is one."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """What an error of any library says, in a line."""
    return (str(error).strip() or repr(error)).splitlines()[0][:300]


def as_arguments(text: str) -> str:
    """A message that names flags, ``--window=4: expected ...``, as Python users read it: ``window=4: expected ...``."""
    return re.sub(r"(?<![\w-])--([a-z][a-z0-9_.]*)", r"\1", text)
