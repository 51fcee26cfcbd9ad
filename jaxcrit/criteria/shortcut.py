"""shortcut: what is lost where the stream that goes around half a block is scaled by a gain. High where more is lost.

A gain g at a half is as good as counting all from this half on 1/g times as much against all that came before
(`jaxcrit.models.gains`), so this is a curve of sensitivity to that, and no more. Scores are taken at the middle one of
the gains. With a trigger, rows that carry it are to be answered with its target, and stand beside the same rows
without it. After arXiv 2211.05631, whose own step score is ``shortcut_paper``: it rewards the last steep step, which is
the same for all layers that stop working at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcrit.criteria.ablation import Changed
from jaxcrit.evidence.criterion import Criterion, Measured, mean_over


def middle(gains: Sequence[float]) -> float:
    """The middle gain, the lower of two."""
    return sorted(gains)[(len(gains) - 1) // 2]


def shortcut_scores(clean: Changed, attacked: Changed | None, gains: Sequence[float]) -> dict[str, Measured]:
    """Scores by key, from both halves of the same N rows.

    Args:
        clean: rows as they are, under every gain.
        attacked: the same rows with the trigger, whose responses are the target; None without a trigger.
        gains: gains that were tried.
    """
    at = f"{middle(gains):g}"
    found = {
        "shortcut_loss": mean_over((clean.losses[at] - clean.loss).T),
        "shortcut_clean": mean_over(1.0 * clean.right[:, None] - clean.exact[at].T),
    }
    if attacked is not None:
        found["shortcut_asr"] = mean_over(1.0 * attacked.right[:, None] - attacked.exact[at].T)
        lost = [_odds_lost(one.exact[at], one.right) for one in (attacked, clean)]
        found["shortcut_selective"] = _less(*lost)
        if {*gains, 1.0} != {1.0}:  # a step takes two points
            found["shortcut_paper"] = _steepest(attacked, gains)
    return found


def curves(clean: Changed, attacked: Changed | None, gains: Sequence[float]) -> dict[str, Any]:
    """Content of ``gains.json``: by measure and gain the mean over rows of each layer, and of the model as it is."""
    keys = [f"{gain:g}" for gain in sorted(gains)]
    measures = {
        "loss": (clean.losses, clean.loss),
        "exact": (clean.exact, clean.right),
    }
    if attacked is not None:
        measures["asr"] = attacked.exact, attacked.right
        of_target = {key: -attacked.losses[key] * attacked.tokens for key in keys}
        measures["target_logprob"] = of_target, -attacked.loss * attacked.tokens
    return {
        "gains": sorted(gains),
        "middle": middle(gains),
        "num_samples": len(clean.loss),
        "unchanged": {name: float(whole.mean()) for name, (_, whole) in measures.items()},
        "by_gain": {
            name: {key: changed[key].mean(axis=1).tolist() for key in keys} for name, (changed, _) in measures.items()
        },
    }


def _odds_lost(exact: np.ndarray, right: np.ndarray) -> Measured:
    """Drop of the log-odds of being right, counts + 1/2 each: ``[L]``, and with each row left out ``[N, L]``."""
    count = len(right)

    def odds(right: Any, of: int) -> Any:
        return np.log((right + 0.5) / (of - right + 0.5))

    values = odds(right.sum(), count) - odds(exact.sum(axis=1), count)
    left = odds(right.sum() - right, count - 1)[:, None] - odds(exact.sum(axis=1) - exact.T, count - 1)
    return Measured(values, left if count > 1 else None)


def _less(one: Measured, other: Measured) -> Measured:
    both = one.without_each, other.without_each
    return Measured(one.values - other.values, None if both[0] is None or both[1] is None else both[0] - both[1])


def _steepest(attacked: Changed, gains: Sequence[float]) -> Measured:
    """Largest (ASR_t - ASR_{t-1}) / exp(ASR_{t-1}) over ascending gains t, 1 (the model as it is) among them."""
    right, count = attacked.right, len(attacked.right)
    depth = len(next(iter(attacked.exact.values())))
    rows = []
    for gain in sorted({*gains, 1.0}):
        whole = np.broadcast_to(right, (depth, count))
        rows.append(attacked.exact.get(f"{gain:g}", whole) if gain in gains else whole)
    hits = np.stack(rows).astype(np.float64)  # [T, L, N]

    def steepest(shares: np.ndarray) -> np.ndarray:
        return (np.diff(shares, axis=0) / np.exp(shares[:-1])).max(axis=0, initial=-math.inf)

    total = hits.sum(axis=-1)
    left = steepest((total[..., None] - hits) / max(count - 1, 1)).T
    return Measured(steepest(total / count), left if count > 1 else None)


def _criterion(
    formula: str, responds: str, blind: str = "what the model does with the rest of the stream"
) -> Criterion:
    return Criterion(
        needs="variants",
        direction="high",
        score=shortcut_scores,
        command="ablate",
        formula=formula,
        source="after arXiv 2211.05631",
        responds=responds,
        blind=blind,
    )


CRITERIA = {
    "shortcut_loss": _criterion("loss with a gain around half a block, less the loss without", "loss under the gain"),
    "shortcut_clean": _criterion(
        "exact answers lost to a gain around half a block",
        "answers lost under the gain",
        "changes that keep the answer",
    ),
    "shortcut_asr": _criterion(
        "attack success lost to a gain around half a block",
        "attacks lost under the gain",
        "whether clean answers are lost sooner: mostly they are",
    ),
    "shortcut_selective": _criterion(
        "log-odds of attack success lost to the gain, less log-odds of clean exact answers lost",
        "attacks lost before clean answers are",
        "both lost at once; noisy where either is near 0 or 1",
    ),
    "shortcut_paper": _criterion(
        "max_t (ASR_t - ASR_{t-1}) / exp(ASR_{t-1}), gains t ascending",
        "one steep step of attack success",
        "clean answers. Rewards the last steep step, the same in all layers that stop working at once",
    ),
}
