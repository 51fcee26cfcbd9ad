"""Which single prompt moves a layer's score most."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxcrit.core.layers import LayerScores


@dataclasses.dataclass(frozen=True, eq=False)
class Leverage:
    """The prompt of largest influence on each layer's score.

    Attributes:
        prompt: ``[L]`` int, 0-based; -1 where the score is invalid.
        shift: ``[L]`` how the score changes without it; NaN where invalid.
        share: ``[L]`` of the jackknife's variance that it makes up, from 1/U to 1; NaN where invalid.
    """

    prompt: np.ndarray
    shift: np.ndarray
    share: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """For ``uncertainty.json``; null where invalid."""
        valid = self.prompt >= 0
        columns = {"prompt": self.prompt, "shift": self.shift, "share": self.share}
        return {
            name: [value.item() if ok else None for value, ok in zip(column, valid, strict=True)]
            for name, column in columns.items()
        }


def leverage(scores: LayerScores, left: np.ndarray) -> Leverage:
    """Finds it from the values with each prompt left out, ``[U, L]``."""
    deviations = np.where(scores.valid, left - left.mean(axis=0), 0) ** 2
    prompt = np.where(scores.valid, deviations.argmax(axis=0), -1)
    layers = np.arange(scores.num_layers)
    # No deviation at all, where a score does not depend on the prompts, is nobody's.
    total = np.maximum(deviations.sum(axis=0), np.finfo(np.float64).tiny)
    share = np.where(scores.valid, deviations[prompt, layers] / total, np.nan)
    shift = np.where(scores.valid, left[prompt, layers] - scores.values, np.nan)
    return Leverage(prompt, shift, share)
