"""Which of a run's processes this is. Alone, unless `jaxcrit.parallel.distributed` has said otherwise.

All processes compute the same; process 0 alone writes, prints and looks at the run directory, for the others may not
see its disk. What follows from such a look is shared, so that all of them go the same way.

Words go through the coordinator of the run, which needs no devices and no like versions of jax, and waits as long as
process 0 takes to write a report; arrays go through the devices.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxcrit.core.errors import UserError

_PATIENCE = 7 * 24 * 3600 * 1000  # ms; who dies takes the others along, so only life is waited for
_MOMENT = 5000  # ms that processes may fail apart
_ENDED = "jaxcrit/ended/"  # by process, its exit code, where it is that of an error
_LOOK = 0.5  # seconds between looks at it
_KILLED = 137  # exit code of a run of which a process was killed, as a shell has it
# Seconds from there to the end: before the one that failed is gone; of the coordinator, that jax needs, after it.
_GRACE = (3.0, 6.5)
_ending = threading.Event()  # this process ends with an error of its own
_index, _count = 0, 1
_said = 0  # things said so far: the same in every process, as all come to the same places


def set_process(index: int, count: int) -> None:
    """Says which process this is; called once, before anything else."""
    global _index, _count
    _index, _count = index, count


def first() -> bool:
    """Whether this process writes and prints."""
    return _index == 0


def alone() -> bool:
    """Whether the run has one process."""
    return _count == 1


def place() -> tuple[int, int]:
    """Number of this process, and of how many."""
    return _index, _count


def share(look: Callable[[], Any]) -> Any:
    """What ``look`` returns in process 0, in all of them; a collective.

    Args:
        look: called in process 0 only, which is alone in the meantime; returns JSON values.

    Raises:
        UserError: whatever one ``look`` raised, in every process.
    """
    if alone():
        return look()
    key = _next_key()
    if not first():
        found = json.loads(_client().blocking_key_value_get(key, _PATIENCE))
    else:
        try:
            with _by_itself():
                found = {"value": look()}
        except UserError as error:
            found = {"error": str(error)}
        _client().key_value_set(key, json.dumps(found))
    if "error" in found:
        raise UserError(found["error"])
    return found["value"]


def gather(value: Any) -> list[Any]:
    """The JSON ``value`` of every process, in their order, in all of them; a collective."""
    if alone():
        return [value]
    key = _next_key()
    _client().key_value_set(f"{key}/{_index}", json.dumps(value))
    return [json.loads(_client().blocking_key_value_get(f"{key}/{number}", _PATIENCE)) for number in range(_count)]


def share_array(array: np.ndarray | None) -> np.ndarray:
    """Process 0's ``array``, in all of them; a collective. What the others give is not looked at."""
    if alone():
        assert array is not None
        return array
    from jax.experimental.multihost_utils import broadcast_one_to_all

    shape, dtype = share(lambda: None if array is None else [list(array.shape), array.dtype.name])
    mine = array if first() else np.zeros(shape, dtype)
    return np.asarray(broadcast_one_to_all(mine)).astype(dtype)


def whole(tree: Any) -> Any:
    """The arrays of a tree on the host, shards that other processes hold included; then a collective."""
    import jax
    from jax.experimental.multihost_utils import process_allgather

    def one(array: Any) -> np.ndarray:
        if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        return np.asarray(process_allgather(array, tiled=True))

    return jax.tree.map(one, tree)


def agree_on_failure(text: str, code: int) -> tuple[bool, bool]:
    """Of a run that ends with an error: whether this process says so, and whether all of them end with it.

    A mistake in a flag fails every process alike, and process 0 speaks for all; a file that one machine lacks fails
    that one alone, and the others would wait for it in vain: they end by `end_with_others`.

    Args:
        text: what went wrong.
        code: exit code.
    """
    if alone():
        return True, True
    _announce(code)
    key = f"jaxcrit/failed/{_said}"
    _client().key_value_set(f"{key}/{_index}", text)
    texts = []
    for number in range(_count):
        try:
            texts.append(_client().blocking_key_value_get(f"{key}/{number}", _MOMENT))
        except Exception:  # jax's own error, of no public class: it has not come
            texts.append(None)
            break
    return first() or texts[0] != text, texts == [text] * _count


def leave(code: int) -> None:
    """Ends this process at once where others are in the run, who end with it; alone, it ends as it will."""
    if not alone():
        _announce(code)
        os._exit(code)


def _announce(code: int) -> None:
    _ending.set()
    with contextlib.suppress(Exception):  # jax's own error, of no public class: the coordinator is gone
        _client().key_value_set(f"{_ENDED}{_index}", str(code))


def end_with_others() -> None:
    """Watches, in a thread, for another process that has ended with an error, and ends this one soon after it."""
    over = threading.Event()

    def watch() -> None:
        try:
            while not (ended := [one for one in _client().key_value_dir_get(_ENDED) if one[0] != f"{_ENDED}{_index}"]):
                if over.wait(_LOOK):
                    return
        except Exception:  # jax's own error: the run is over
            return
        if over.wait(_GRACE[_index == 0]) or _ending.is_set():  # what fails all of them alike is said by the first
            return
        name, code = ended[0]
        _end_with(name.removeprefix(_ENDED), int(code))

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()

    def stop() -> None:
        over.set()
        watching.join(_LOOK + 1.5)

    # A thread that the end of Python meets inside jax's client aborts the process ("exception not rethrown"). Named
    # after jax's own, this is called before it: while the coordinator still answers.
    atexit.register(stop)


def gone(other: int) -> None:
    """Ends the run of a process that is gone without a word, as a kill ends it: first the others, then this one."""
    if not first():  # process 0, and with it the coordinator
        time.sleep(_MOMENT / 1000)  # if it has failed, it has said so
        if not _ending.is_set():
            _end_with(str(other), _KILLED)
        return
    with contextlib.suppress(Exception):  # jax's own error, of no public class: the process has said why it ends
        _client().key_value_set(f"{_ENDED}{other}", str(_KILLED))


def _end_with(other: str, code: int) -> None:
    what = "was killed" if code == _KILLED else "has failed"
    print(f"jaxcrit: process {other} {what}, and this one ends with it", file=sys.stderr, flush=True)
    os._exit(code)


def make_directory(path: Path) -> None:
    """Makes a directory to write to, and those above it."""
    if first():
        path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _by_itself() -> Iterator[None]:
    global _count
    count, _count = _count, 1
    try:
        yield
    finally:
        _count = count


def _next_key() -> str:
    global _said
    _said += 1
    return f"jaxcrit/{_said}"


def _client() -> Any:
    """The coordinator's client. jax has no public name for it; orbax takes it from here too."""
    from jax._src.distributed import global_state

    return global_state.client
