"""Notice to leave: SIGTERM, which clusters send before they take a machine back, and Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from jaxcrit.core import processes

Leave = Callable[[int], bool]
Item = TypeVar("Item")
INTERRUPTED = 130  # exit code
_BY_HAND = threading.Event()  # Ctrl-C came while a run listened


class Preempted(Exception):
    """A run that was told to leave, and has saved; the same command goes on with it. Carries a line for the user.

    Attributes:
        by_hand: whether it was Ctrl-C, after which nobody should start the run again by themselves.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self.by_hand = _BY_HAND.is_set()


@contextlib.contextmanager
def notice() -> Iterator[Leave]:
    """While open, SIGTERM and the first Ctrl-C end nothing; the function given says, at each step, whether one came.

    Of several processes it may reach one alone, and no two at the same step: jax's coordination service then agrees on
    a step that all of them will reach, and the answer is yes there and nowhere else. Call it once a step.
    """
    come, alone = threading.Event(), processes.alone()
    _BY_HAND.clear()

    def interrupted(*_: Any) -> None:
        if _BY_HAND.is_set():
            raise KeyboardInterrupt
        _BY_HAND.set()
        come.set()
        # Not by print: what it writes to may be in the middle of a line that this handler has interrupted.
        os.write(2, b"\njaxcrit: interrupted; leaves when what is under way is saved; again leaves at once\n")
        if not alone:
            os.kill(os.getpid(), signal.SIGTERM)  # which is what jax listens to

    handlers: dict[int, Any] = {signal.SIGINT: interrupted}
    if alone:
        handlers[signal.SIGTERM] = lambda *_: come.set()
    here = threading.current_thread() is threading.main_thread()  # no other may listen
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as behind nohup
    wanted = {number: act for number, act in handlers.items() if here and not (number == signal.SIGINT and ignored)}
    before = {number: signal.signal(number, act) for number, act in wanted.items()}
    try:
        if alone:
            yield lambda step: come.is_set()
        else:
            from jax.experimental.multihost_utils import reached_preemption_sync_point

            yield reached_preemption_sync_point
    finally:
        for number, act in before.items():
            signal.signal(number, act)


def one_by_one(
    items: Sequence[Item],
    do: Callable[[Item], None],
    told: Callable[[int], str],
    save: Callable[[], None] = lambda: None,
) -> None:
    """Does every item; told to leave, keeps what is done and raises `Preempted` in place of the next one.

    Args:
        items: what is to do.
        do: does one.
        told: function of the number of items done, which says how far that is.
        save: keeps what is done.

    Raises:
        Preempted: with a line for the user.
    """
    with notice() as leave:
        for number, item in enumerate(items, 1):
            do(item)
            if leave(number) and number < len(items):
                save()
                raise Preempted(f"told to leave {told(number)}; the same command goes on from there")


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """While open, a second Ctrl-C ends the process, also in the middle of what Python does not see: compiling, a step.

    For the command; a notebook has its own mind.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reads, writes = os.pipe()
    os.set_blocking(writes, False)

    def watch() -> None:
        come = 0
        while told := os.read(reads, 64):  # the numbers of signals, as the system brings them
            come += told.count(signal.SIGINT)
            if come > 1:
                os.write(2, b"jaxcrit: interrupted\n")
                os._exit(INTERRUPTED)
        os.close(reads)

    threading.Thread(target=watch, daemon=True).start()
    before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writes)
