"""Progress bars on stderr, for terminals only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from jaxcrit.core.console import visible

Say = Callable[[str], None]  # told what goes on, a line at a time


def bars(**settings: Any) -> tqdm:
    """A bar of tqdm; none where stderr is not a terminal."""
    settings["desc"] = visible(settings.get("desc") or "")
    return tqdm(**{"disable": None, "unit": " samples", "leave": False, **settings})


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
