"""perturbation_gain: which layers carry a small change of the embeddings on enlarged (after CLAT, arXiv 2408.10204).

With delta a perturbation of the embedding output, ``w_l`` is the mean over rows and tokens of
``||h_l(x + delta) - h_l(x)|| / ||h_l(x)||`` and the gain is ``w_l / w_{l-1}``; for layer 0 the embedding is in front.
High is critical. Unlike CLAT's, w is relative: on a decoder differences by themselves grow as the stream does. The
first token, an attention sink, is left out. delta is within ``eps`` of each token's embedding, and found by ascent of
the divergence of the prediction at the last token: one for all layers, or (``own``) each layer's own, of w itself,
which is as many times dearer as there are layers.

``perturbation_gain_wide`` is the same within ``wide``: at ten times the radius some tokens turn into sinks, and the
layer where that happens stands out. ``perturbation_gain_local`` is the most that a block does to arbitrarily small
changes, wherever they come from: the largest singular value of its derivative, between changes relative to the states,
by power iteration.

Beside the gains stand those of random noise of the same size: where they rank the layers alike, nothing about the gains
is adversarial.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcrit.core.options import Options, option
from jaxcrit.evidence.criterion import Criterion, Measured, mean_over

if TYPE_CHECKING:  # jax is imported where it is used, so that the options can be listed at once
    from jaxcrit.evidence.perturbed import Moved


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerturbationOptions(
    Options,
    title="perturbation_gain, perturbation_gain_wide and perturbation_gain_local",
    prefix="perturbation_gain",
):
    """What perturbations are asked."""

    eps: float = option(0.05, "length allowed, in norms of the embedding", above=0)
    wide: float = option(0.5, "the same for perturbation_gain_wide", above=0)
    steps: int = option(5, "steps of the ascent", lowest=1)
    own: bool = option(False, "a search for each layer, as many times dearer")
    rounds: int = option(10, "rounds of power iteration, for perturbation_gain_local", lowest=1)
    seed: int = option(0, "seed of the starts", lowest=0)


def search(options: PerturbationOptions) -> Any:
    """The search within ``eps``."""
    from jaxcrit.evidence.perturbed import Search

    return Search(options.eps, options.steps, options.own, options.seed)


def wide_search(options: PerturbationOptions) -> Any:
    """The search within ``wide``."""
    return search(dataclasses.replace(options, eps=options.wide))


def blocks(options: PerturbationOptions) -> Any:
    """Every block by itself."""
    from jaxcrit.evidence.perturbed import Blocks

    return Blocks(options.rounds, options.seed)


def perturbation_gain(found: Moved, options: PerturbationOptions) -> Measured:
    """Gains ``[L]``; in the meta those of random noise, and w itself, the embedding's in front."""
    whole, each = found.found.sum(axis=0), found.found
    tokens = found.tokens.sum()
    noise = found.random.sum(axis=0)
    meta = {
        "steps": options.steps,
        "own": options.own,
        "seed": options.seed,
        "change": (whole / tokens).tolist(),
        "noise_gain": [gain if np.isfinite(gain) else None for gain in _gains(noise).tolist()],
        "noise_change": (noise / tokens).tolist(),
    }
    return Measured(_gains(whole), _gains(whole - each) if len(each) > 1 else None, meta=meta)


def local(found: np.ndarray, options: PerturbationOptions) -> Measured:
    """Mean over the prompts, ``[L]``."""
    return dataclasses.replace(mean_over(found), meta={"rounds": options.rounds, "seed": options.seed})


def _gains(change: np.ndarray) -> np.ndarray:
    """Of changes summed over tokens ``[..., L+1]``; NaN behind a layer where nothing moves."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return change[..., 1:] / change[..., :-1]


def _row(score: Any, tap: Any, formula: str, responds: str, blind: str) -> Criterion:
    return Criterion(
        needs="perturbed",
        direction="high",
        score=score,
        tap=tap,
        options=PerturbationOptions,
        formula=formula,
        source="after CLAT",
        responds=responds,
        blind=blind,
    )


CRITERIA = {
    "perturbation_gain": _row(
        perturbation_gain,
        search,
        "w_l / w_{l-1}, w_l = mean ||h_l(x + δ) - h_l(x)|| / ||h_l(x)||, δ adversarial within eps",
        "a small change that this layer enlarges, against the state's own growth",
        "the first token. Nearly flat inside a model; noise of the same size ranks layers much alike",
    ),
    "perturbation_gain_wide": _row(
        perturbation_gain,
        wide_search,
        "the same, δ within wide",
        "tokens that turn into attention sinks",
        "the first token; what small changes do",
    ),
    "perturbation_gain_local": _row(
        local,
        blocks,
        "largest singular value of block l's derivative, changes relative to the states",
        "the most that this block can enlarge an arbitrarily small change",
        "whether any change of the embeddings reaches it so; the first token",
    ),
}
