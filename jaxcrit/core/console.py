"""The terminal: the one place that decides how letters are spelled that it cannot show.

Windows code pages and the C locale have no Greek. Python would end in a traceback after all the work is done; here a
letter is spelled out (``delta`` for δ), a sign is replaced by the nearest that there is, and nothing else is touched.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from typing import TextIO

from jaxcrit.core import processes

_SIGNS = {"±": "+-", "−": "-", "–": "-", "—": "-", "‘": "'", "’": "'", "“": '"', "”": '"', "…": "...", "·": "."}
_SIGNS |= {"×": "x", "≤": "<=", "≥": ">=", "≠": "!=", "≈": "~", "→": "->", "◀": "<", "√": "sqrt", "ℓ": "l", "²": "^2"}
_ERRORS = "jaxcrit.spelled"
# Control characters but tab and line feed, marks of direction, separators of lines that are none, half surrogates.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def spelled(text: str) -> str:
    """The text in ASCII: Greek letters by name, signs by what stands for them, ``?`` for what has no such form."""
    return "".join(letter if letter.isascii() else _ascii(letter) for letter in text)


def visible(text: str) -> str:
    """The text with what a terminal would obey written out: ``\\x1b`` for an escape, ``\\u202e`` for a turn of writing.

    Line breaks and tabs stay; so do joiners, which letters of some scripts need.
    """
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def obeys(stream: TextIO) -> bool:
    """Whether a stream is a terminal that knows bold and how to go back to the start of a line."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def width(*, error: bool = False) -> int:
    """Columns to fill: those of the terminal, up to 100; 100 where there is none."""
    stream = sys.stderr if error else sys.stdout
    return min(shutil.get_terminal_size((100, 24)).columns, 100) if stream.isatty() else 100


def tell(text: str, *, error: bool = False) -> None:
    """Prints text that may hold what came from files, on the channel of results or on that of errors."""
    print(visible(text), file=sys.stderr if error else sys.stdout, flush=error)


def spell_what_cannot_be_shown() -> None:
    """Lets stdout and stderr spell what their encoding has no letter for; called once, before anything is printed."""
    codecs.register_error(_ERRORS, _handle)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a stream that somebody put in their place may not have it
            stream.reconfigure(errors=_ERRORS)


def open_what_is_closed() -> None:
    """Makes closed standard streams lead nowhere, so that no file of a run is opened in their place and printed to."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            mode = "r" if number == 0 else "w"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 (it stays open)


def note(text: str) -> None:
    """Tells what happened to the input, on the channel that results do not take; one process of a run speaks."""
    if processes.first():
        tell(text, error=True)


_after: list[list[str]] = []


@contextlib.contextmanager
def remarks_last() -> Iterator[None]:
    """While open, remarks wait, and are told when the block ends without an error, which is one line alone."""
    waiting: list[str] = []
    _after.append(waiting)
    try:
        yield
    finally:
        _after.remove(waiting)
    for text in waiting:
        note(text)


def remark(text: str) -> None:
    """A note about input that results do not depend on; see `remarks_last`."""
    if _after:
        _after[-1].append(text)
    else:
        note(text)


def _ascii(letter: str) -> str:
    if letter in _SIGNS:
        return _SIGNS[letter]
    words = unicodedata.name(letter, "").split()
    if words[:1] == ["GREEK"] and "LETTER" in words:
        name = words[words.index("LETTER") + 1].lower().replace("lamda", "lambda")
        return name.capitalize() if "CAPITAL" in words else name
    plain = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
    return plain or "?"


def _handle(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return spelled(error.object[error.start : error.end]), error.end
