"""The table of criteria beside δ and step: what each needs, which way it points, how it is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np

from jaxcrit.core.deletions import jackknife_stderr
from jaxcrit.core.errors import UserError, did_you_mean
from jaxcrit.core.layers import Direction, LayerScores
from jaxcrit.criteria.angular_distance import angular_distance
from jaxcrit.criteria.block_influence import block_influence
from jaxcrit.criteria.effective_rank import effective_rank
from jaxcrit.criteria.fisher import fisher
from jaxcrit.criteria.gradient_norm import gradient_norm
from jaxcrit.criteria.lens_kl import lens_kl
from jaxcrit.criteria.rgn import rgn
from jaxcrit.criteria.stable_rank import stable_rank
from jaxcrit.criteria.weight_change import weight_change
from jaxcrit.criteria.weight_snr import weight_snr
from jaxcrit.evidence.criterion import Measured

Needs = Literal["weights", "two models", "states", "gradients"]
_ANALYZED = ("delta", "delta_debiased", "step", "step_debiased")


@dataclasses.dataclass(frozen=True)
class LayerCriterion:
    """One criterion.

    Attributes:
        needs: which evidence; one pass serves all that need the same.
        direction: which values are critical.
        function: of that evidence.
    """

    needs: Needs
    direction: Direction
    function: Callable[[Any], Measured]

    def scores(self, key: str, found: Measured, meta: Mapping[str, Any]) -> LayerScores:
        """As scores; invalid where not finite, with the jackknife's error where there are deletions."""
        left, facts = found.without_each, {**meta, "needs": self.needs}
        stderr = None if left is None else jackknife_stderr(left)
        return LayerScores(key, found.values, np.isfinite(found.values), self.direction, stderr, facts)


LAYER_CRITERIA: Mapping[str, LayerCriterion] = {
    "weight_snr": LayerCriterion("weights", "high", weight_snr),
    "stable_rank": LayerCriterion("weights", "low", stable_rank),
    "weight_change": LayerCriterion("two models", "high", weight_change),
    "angular_distance": LayerCriterion("states", "high", angular_distance),
    "block_influence": LayerCriterion("states", "high", block_influence),
    "effective_rank": LayerCriterion("states", "low", effective_rank),
    "lens_kl": LayerCriterion("states", "high", lens_kl),
    "gradient_norm": LayerCriterion("gradients", "high", gradient_norm),
    "rgn": LayerCriterion("gradients", "high", rgn),
    "fisher": LayerCriterion("gradients", "high", fisher),
}


def parse_criteria(text: str, *, two_models: bool) -> list[str]:
    """Keys of a comma list; an empty one is every criterion, without those of two models where there is one.

    Raises:
        UserError: an unknown key, or one of two models where there is one.
    """
    if not text:
        return [key for key, one in LAYER_CRITERIA.items() if two_models or one.needs != "two models"]
    keys = list(dict.fromkeys(key.strip() for key in text.split(",")))
    for key in keys:
        if key in _ANALYZED:
            raise UserError(f"--criteria={key}: is computed by jaxcrit analyze, from prompts alone")
        if key not in LAYER_CRITERIA:
            nearest = did_you_mean(key, LAYER_CRITERIA)
            raise UserError(f"--criteria={key}: expected some of {', '.join(LAYER_CRITERIA)}{nearest}")
        if LAYER_CRITERIA[key].needs == "two models" and not two_models:
            raise UserError(f"--criteria={key}: compares a tuned model with its base; give --base=DIR too")
    return keys


def needed(keys: Iterable[str]) -> set[Needs]:
    """The kinds of evidence that criteria need."""
    return {LAYER_CRITERIA[key].needs for key in keys}
