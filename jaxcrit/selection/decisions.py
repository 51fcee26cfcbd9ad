"""What several criteria would choose of a model's layers, and where they agree."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from jaxcrit.core.errors import UserError
from jaxcrit.core.layers import LayerScores
from jaxcrit.core.selections import LayerSpec, default_count, resolve


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one criterion would choose.

    Attributes:
        layers: the most critical ones, sorted.
        next: the first layer that is not among them; None where there is none.
        firm: whether the last of them is two standard errors from ``next``; None where no errors are known.
    """

    layers: tuple[int, ...]
    next: int | None
    firm: bool | None


def choices(scores: Mapping[str, LayerScores], *, trim: int = 2) -> dict[str, Choice]:
    """By criterion, as many layers as ``critical`` chooses; without criteria that have too few valid layers.

    Args:
        scores: scores of L layers.
        trim: layers at each end that are never chosen.
    """
    found = {}
    for key, score in scores.items():
        count = default_count(score.num_layers)
        ranking = [int(layer) for layer in score.ranking() if trim <= layer < score.num_layers - trim]
        try:
            chosen = resolve(LayerSpec("key", count=count, key=key), score.num_layers, scores=scores, trim=trim)
        except UserError:
            continue
        if np.ptp(score.values[list(ranking)]) == 0:
            continue
        after = ranking[count] if len(ranking) > count else None
        firm = None
        if after is not None and score.stderr is not None:
            last = ranking[count - 1]
            gap = abs(score.values[last] - score.values[after])
            firm = bool(gap > 2 * math.hypot(score.stderr[last], score.stderr[after]))
        found[key] = Choice(chosen.layers, after, firm)
    return found


def agreed(found: Mapping[str, Choice]) -> dict[int, int]:
    """By layer, how many criteria choose it, most first; layers that two or more choose."""
    counts: dict[int, int] = {}
    for one in found.values():
        for layer in one.layers:
            counts[layer] = counts.get(layer, 0) + 1
    kept = sorted((layer for layer, count in counts.items() if count > 1), key=lambda layer: (-counts[layer], layer))
    return {layer: counts[layer] for layer in kept}
