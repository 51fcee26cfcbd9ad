"""Which of a run's processes this is. Alone, unless `jaxcrit.parallel.distributed` has said otherwise.

All processes compute the same; process 0 alone writes, prints and looks at the run directory, for the others may not
see its disk. What follows from such a look is shared, so that all of them go the same way.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxcrit.core.errors import UserError

_index, _count = 0, 1


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


def share(look: Callable[[], Any]) -> Any:
    """What ``look`` returns in process 0, in all of them; a collective.

    Args:
        look: called in process 0 only; returns JSON values.

    Raises:
        UserError: whatever one ``look`` raised, in every process.
    """
    if alone():
        return look()
    found: dict[str, Any] = {}
    if first():
        try:
            found = {"value": look()}
        except UserError as error:
            found = {"error": str(error)}
    found = json.loads(share_bytes(json.dumps(found).encode()))
    if "error" in found:
        raise UserError(found["error"])
    return found["value"]


def share_bytes(content: bytes) -> bytes:
    """Process 0's ``content``, in all of them; a collective."""
    if alone():
        return content
    from jax.experimental.multihost_utils import broadcast_one_to_all

    # Everyone has to know the length before arrays of it can be sent.
    length = int(broadcast_one_to_all(np.int32(len(content))))
    mine = np.frombuffer(content, np.uint8) if first() else np.zeros(length, np.uint8)
    return np.asarray(broadcast_one_to_all(mine)).astype(np.uint8).tobytes()


def wait_for_all(where: str) -> None:
    """Returns when every process has come here."""
    if not alone():
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(where)
