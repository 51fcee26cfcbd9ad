"""Notice to leave: SIGTERM, which clusters send before they take a machine back."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from jaxcrit.core import processes

Leave = Callable[[int], bool]


class Preempted(Exception):
    """A run that was told to leave, and has saved; the same command goes on with it. Carries a line for the user."""


@contextlib.contextmanager
def notice() -> Iterator[Leave]:
    """While open, SIGTERM ends nothing; the function given says, at each step, whether it has come.

    Of several processes it may reach one alone, and no two at the same step: jax's coordination service then agrees on
    a step that all of them will reach, and the answer is yes there and nowhere else. Call it once a step.
    """
    if not processes.alone():
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        yield reached_preemption_sync_point
    elif threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # only the main thread may listen
    else:
        come = threading.Event()
        before = signal.signal(signal.SIGTERM, lambda *_: come.set())
        try:
            yield lambda step: come.is_set()
        finally:
            signal.signal(signal.SIGTERM, before)
