"""Published ways to choose layers, as rules over scores, and where each of them misleads.

A recipe is a row: which score, how many layers, which end of the ranking. Counts and ties are those of the authors'
released code where there is some; what scores of layers cannot say is said in the row.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

import numpy as np

from jaxcrit.core.errors import UserError, did_you_mean
from jaxcrit.core.layers import LayerScores, LayerSet
from jaxcrit.core.selections import default_count, span
from jaxcrit.selection.cautions import FLAT, training_caution
from jaxcrit.selection.correlation import spearman

Scores = Mapping[str, LayerScores]
_DEPTH = 0.9  # of |ρ| with the layer's number: the curve says little beyond it
_NOTHING = 1e-3  # CKA of states that all rows share is 0/0; authors' scripts write 0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One published choice.

    Attributes:
        key: score that it ranks by; empty for none.
        count: layers chosen of L, where no number is given.
        pick: the chosen layers by values ``[L]`` (NaN where there is none) and their number.
        use: ``train`` the chosen layers, or ``leave out``.
        source: paper, and the code that the rule was read in.
        differs: what of the published choice scores of layers do not hold; empty for nothing.
    """

    key: str
    count: Callable[[int], int]
    pick: Callable[[np.ndarray, int], np.ndarray]
    use: str
    source: str
    differs: str = ""


def _lowest(values: np.ndarray, count: int) -> np.ndarray:
    """Lowest values, ties to the lower layer."""
    order = np.argsort(values, kind="stable")
    return order[: min(count, int(np.isfinite(values).sum()))]


def _highest(values: np.ndarray, count: int) -> np.ndarray:
    return _lowest(-values, count)


def _inside(values: np.ndarray, count: int) -> np.ndarray:
    """Lowest values but of the two layers at each end."""
    inner = np.full_like(values, np.nan)
    inner[2:-2] = values[2:-2]
    return _lowest(inner, count)


def _first_and_lowest(values: np.ndarray, count: int) -> np.ndarray:
    """Layer 0, whose step from the embedding is no score here and 0.000 there, and then the lowest."""
    return np.concatenate([[0], _lowest(np.where(np.arange(len(values)) > 0, values, np.nan), count - 1)])


def _block(values: np.ndarray, count: int) -> np.ndarray:
    """The run of layers from layer 1 on whose values add up to least; of equal ones the first."""
    sums = np.convolve(values[1:], np.ones(count), mode="valid")
    return 1 + int(np.nanargmin(sums)) + np.arange(count) if np.isfinite(sums).any() else np.arange(0)


def _last(values: np.ndarray, count: int) -> np.ndarray:
    return np.arange(len(values) - count, len(values))


RECIPES: Mapping[str, Recipe] = {
    "liu2025": Recipe(
        "delta",
        default_count,
        _inside,
        "train",
        "Liu et al. 2025 (2506.00382): lowest biased δ, 15 % of the layers (5 of 32), two at each end left aside",
    ),
    "ogawa2026": Recipe(
        "step",
        lambda depth: depth // 2,
        _first_and_lowest,
        "train",
        "Ogawa et al. 2026 (2602.05988): lowest biased CKA(input, output), half of the layers",
        "layer 0 is always among them: their tap makes its CKA 0.000, and it has no score here",
    ),
    "spectrum": Recipe(
        "weight_snr",
        lambda depth: depth // 2,
        _highest,
        "train",
        "Hartford et al. 2024 (2406.06623): highest SNR, half of each kind of matrix; embedding and head train too",
        "they choose among matrices of each kind; by layers it comes down to the mean of a layer's matrices",
    ),
    "shortgpt": Recipe(
        "block_influence",
        lambda depth: depth // 4,
        _lowest,
        "leave out",
        "Men et al. 2024 (2403.03853): lowest block influence, about a quarter of the layers",
    ),
    "gromov": Recipe(
        "angular_distance",
        lambda depth: depth // 4,
        _block,
        "leave out",
        "Gromov et al. 2024 (2403.17887): the run of layers across which the last token turns least",
        "they measure the angle across the run; angles of single layers add up to an upper bound of it, equal for one",
    ),
    "tail": Recipe(
        "",
        lambda depth: depth // 4,
        _last,
        "leave out",
        "Lu et al. 2024 (2411.15558): the last layers, a quarter of them, by no score",
    ),
}


def by_recipe(
    text: str, scores: Scores, num_layers: int, *, model_hash: str | None = None, hint: str = ""
) -> tuple[Recipe, LayerSet]:
    """Chooses as a paper did.

    Args:
        text: name of a recipe, and ``:K`` for another number of layers than it has.
        scores: scores by key.
        num_layers: L.
        model_hash: kept in the set.
        hint: what to do where the score is absent.

    Raises:
        UserError: no such recipe, a score that is absent, or more layers asked for than it can choose.
    """
    name, _, number = text.partition(":")
    if name not in RECIPES:
        raise UserError(f"--recipe={text}: expected {', '.join(RECIPES)}{did_you_mean(name, RECIPES)}")
    if ":" in text and not re.fullmatch("[1-9][0-9]{0,4}", number):
        raise UserError(f"--recipe={text}: expected {name}:K with a whole number of layers")
    recipe = RECIPES[name]
    if recipe.key and recipe.key not in scores:
        there = f"; there are {', '.join(scores)}" if scores else ""
        raise UserError(f"--recipe={text}: ranks by {recipe.key}, and there is no such score{there}{hint}")
    count = int(number) if number else max(1, recipe.count(num_layers))
    values = scores[recipe.key].values if recipe.key else np.zeros(num_layers)
    most = num_layers - (1 if recipe.pick is _block else 0)
    picked = recipe.pick(values, count) if count <= most else np.arange(0)
    if len(picked) != count:
        raise UserError(f"--recipe={text}: {count} layers are more than it can choose of {num_layers}")
    layers = tuple(sorted(int(layer) for layer in picked))
    return recipe, LayerSet(layers, recipe.key or "depth", f"recipe {name}:{count}", num_layers, model_hash)


def lint(recipe: Recipe, scores: Scores, chosen: LayerSet) -> list[str]:
    """Where a recipe misleads on these scores, a line each; none where nothing was found.

    Args:
        recipe: the recipe.
        scores: scores by key.
        chosen: what it chose.
    """
    told = [f"as published, but for this: {recipe.differs}"] if recipe.differs else []
    if not recipe.key:
        return [*told, "the very last layer is among them, which others keep; compare its loss with random sets"]
    score = scores[recipe.key]
    told += _tap(score, chosen) + _certain(score, chosen) + _depth(score, chosen)
    return told + _estimator(recipe, scores, chosen) + training_caution(score.meta)


def _tap(score: LayerScores, chosen: LayerSet) -> list[str]:
    """What the states were read at."""
    if score.name == "weight_snr":
        return []
    position, told = score.meta.get("position"), []
    if score.name == "block_influence" or position in ("mean", "all"):
        told.append(
            "every token counts, that at position 0 too: where it is an attention sink its state is far larger than"
            " others and hardly turns, and where it forms and goes, layers look important for this one token"
        )
    elif position is None and score.name in ("delta", "step"):
        told.append("where the states were read is not known: with padding on the right, a last column is padding")
    shared = [layer for layer in np.flatnonzero(score.valid) if abs(score.values[layer]) < _NOTHING]
    if shared and score.name in ("delta", "step"):
        told.append(
            f"CKA is 0.000 at layers {span(map(int, shared))}: states that all rows share, as of a tap on padding or on"
            " a line break before it; such a layer is no change"
        )
    return told


def _certain(score: LayerScores, chosen: LayerSet) -> list[str]:
    """Whether the curve stands out of its errors, and the last layer chosen from the first left out."""
    if score.stderr is None:
        return []
    valid = np.flatnonzero(score.valid)
    values, error = score.values[valid], float(np.nanmedian(score.stderr[valid]))
    if np.ptp(values) < FLAT * error:
        return [f"flat curve: its range {np.ptp(values):.4f} is within {FLAT:.0f} standard errors ({error:.4f})"]
    inside = np.isin(valid, chosen.layers)
    if inside.all() or not inside.any() or chosen.rule.startswith("recipe gromov"):
        return []
    # Of two layers, one chosen and one not, the nearest in value.
    gaps = np.abs(values[inside][:, None] - values[~inside][None, :])
    first, second = np.unravel_index(int(gaps.argmin()), gaps.shape)
    one, other = valid[inside][first], valid[~inside][second]
    apart, noise = gaps[first, second], float(np.hypot(score.stderr[one], score.stderr[other]))
    if apart >= 2 * noise:
        return []
    return [
        f"not determined: layer {one} is chosen and {other} is not, and they differ by {apart:.4f} with a standard"
        f" error of {noise:.4f}"
    ]


def _depth(score: LayerScores, chosen: LayerSet) -> list[str]:
    """Whether the layer's number would have done."""
    valid = np.flatnonzero(score.valid)
    rho = spearman(score.values[valid], valid.astype(float)) if len(valid) > 2 else 0.0
    if abs(rho) < _DEPTH:
        return []
    return [f"depth alone orders these layers (ρ {rho:.2f}): compare with --recipe=tail and first:{len(chosen.layers)}"]


def _estimator(recipe: Recipe, scores: Scores, chosen: LayerSet) -> list[str]:
    """Whether the estimate without bias chooses otherwise."""
    other = scores.get(f"{recipe.key}_debiased")
    if other is None:
        return []
    unbiased = {int(layer) for layer in recipe.pick(other.values, len(chosen.layers))}
    if unbiased == set(chosen.layers):
        return []
    return [
        f"biased CKA chooses here, which few samples inflate: without the bias it would be layers"
        f" {span(sorted(unbiased))}"
    ]
