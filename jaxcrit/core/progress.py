"""Progress on stderr: a bar on a terminal, a plain line now and then where there is none, as in the log of a job."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from tqdm import tqdm

from jaxcrit.core import console
from jaxcrit.core.console import visible

Say = Callable[[str], None]  # told what goes on, a line at a time
# Between two lines of a log: seconds at least, part of the whole if that takes longer, seconds at most.
_LEAST, _PART, _MOST = 30.0, 0.05, 600.0
_BAR = "{desc}: {percentage:3.0f}%|{bar:8}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}"
# What a step prints beside it stands for its rate, or the line would not fit 80 columns.
_STEPS, _REST = _BAR + "{postfix}]", _BAR + ", {rate_fmt}{postfix}]"


def bars(**settings: Any) -> Any:
    """A bar of tqdm; `Lines` where stderr is no terminal, or one that cannot go back to the start of a line."""
    settings = {"unit": " samples", **settings, "desc": visible(settings.get("desc") or "")}
    if not console.obeys(sys.stderr):
        return Lines(**settings)
    return tqdm(leave=False, bar_format=_STEPS if settings["unit"] == " steps" else _REST, **settings)


class Lines:
    """A bar as lines of a log: at most one in half a minute, and of a long run one for every twentieth of it.

    ``training: step 120 of 2,000 (6 %), loss 1.2345, 812 tokens/s, 0:01:05 gone, 0:16:58 left``

    Attributes:
        n: how much is done.
        total: how much there is to do.
    """

    def __init__(self, *, total: float | None, desc: str = "", unit: str = "", initial: float = 0):
        self.n, self.total, self._name, self._unit = float(initial), total or 0.0, desc, unit.strip()
        self._began = self._told = time.monotonic()
        self._first: tuple[float, float] | None = None  # when the first part was done, which compiles, and how much
        self._beside = ""

    def update(self, done: float = 1) -> None:
        """Counts what is done, and tells it if it is time."""
        self.n += done
        now = time.monotonic()
        if not done or self.n >= self.total:
            return
        self._first = self._first or (now, self.n)
        left = self._left(now)
        whole = now - self._began + (left or 0.0)
        if now - self._told >= min(max(_LEAST, _PART * whole), _MOST):
            self._told = now
            console.note(self._line(now, left))

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Takes what the next line says beside it."""
        self._beside = text

    def close(self) -> None:
        """Says no more."""

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _left(self, now: float) -> float | None:
        """Seconds left, at the rate since the first part was done; None before the second is."""
        began, done = self._first or (now, self.n)
        return (self.total - self.n) * (now - began) / (self.n - done) if self.n > done else None

    def _line(self, now: float, left: float | None) -> str:
        of = f"{self.n:,.0f} of {self.total:,.0f}"
        parts = [
            f"{f'step {of}' if self._unit == 'steps' else f'{of} {self._unit}'} ({100 * self.n / self.total:.0f} %)",
            *([self._beside] if self._beside else []),
            f"{_time(now - self._began)} gone",
            *([] if left is None else [f"{_time(left)} left"]),
        ]
        return f"{self._name}: {', '.join(parts)}"


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class _Unseen:
    """What stands for a bar where none is wanted."""

    n, total = 0, 0

    def update(self, done: int = 1) -> None:
        """Shows nothing."""

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Shows nothing."""


@contextlib.contextmanager
def bar(bars: Callable[..., Any] | None, **settings: Any) -> Iterator[Any]:
    """A progress bar as a context.

    Args:
        bars: maker of bars (tqdm's signature); None for one that shows nothing.
        **settings: arguments of it: ``total``, ``desc``, ``unit``, ``initial``.
    """
    if bars is None:
        yield _Unseen()
        return
    with contextlib.closing(bars(**settings)) as made:
        yield made


def moved(bar: Any) -> Callable[..., None]:
    """A function of how much is done and how much there is to do, in all, that moves a bar there."""

    def move(done: int, total: int, *_: Any) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return move
