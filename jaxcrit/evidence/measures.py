"""Other measures of an analysis, with progress: the spectral ones take seconds at a few hundred samples."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxcrit.models.model import Bars
from jaxcrit.similarity import measure, parse_measures


def measured(grams: Any, names: str, progress: Bars | None) -> dict[str, np.ndarray]:
    """What ``--measures`` names, each ``[L, L]``; nothing where it names nothing.

    Raises:
        UserError: see `measure`.
    """
    wanted = parse_measures(names)
    if not wanted:
        return {}
    if progress is None:
        return measure(grams, wanted)
    with progress(total=len(wanted) * len(grams), desc="measures", unit=" layers") as bar:
        return measure(grams, wanted, progress=bar.update)
