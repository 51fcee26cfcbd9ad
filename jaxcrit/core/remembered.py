"""Arrays that are dear to make, kept in the user's cache directory under all that determines them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxcrit.core import processes
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import Npz, cache_directory, read_npz, sweep, write_npz
from jaxcrit.core.hashing import sha256_json
from jaxcrit.core.schema import Array

Arrays = dict[str, np.ndarray]
# Bytes that arrays of a kind may take; what was used longest ago goes first. A covariance of Llama-3-8B is 0.8 GB.
LARGEST = 8 * 2**30


def remembered(kind: str, of: Mapping[str, Any], holds: Mapping[str, Array], make: Callable[[], Arrays]) -> Arrays:
    """What is kept; else what ``make`` gives, which is kept.

    Args:
        kind: what the arrays are; a folder of the cache.
        of: all that determines them, as JSON values.
        holds: what they must be.
        make: makes them.
    """
    found = recalled(kind, of, holds)
    if found is None:
        found = make()
        remember(kind, of, found)
    return found


def recalled(kind: str, of: Mapping[str, Any], holds: Mapping[str, Array]) -> Arrays | None:
    """What is kept; None where nothing is, and for runs of several processes, which need not share a disk."""
    file = _file(kind, of)
    if not processes.alone() or not file.exists():
        return None
    try:
        return read_npz(file, Npz(f"jaxcrit.{kind}", holds))[0]
    except UserError:  # a damaged cache is made again
        return None


def remember(kind: str, of: Mapping[str, Any], arrays: Arrays) -> None:
    """Keeps arrays, where there is room: a cache is no reason to fail."""
    if processes.alone():
        try:
            file = _file(kind, of)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_npz(file, arrays, {"format": f"jaxcrit.{kind}", "format_version": 1})
            sweep(file.parent.glob("*.npz"), LARGEST)
        except OSError:
            return


def _file(kind: str, of: Mapping[str, Any]) -> Path:
    return cache_directory() / kind / f"{sha256_json(of)[:32]}.npz"
