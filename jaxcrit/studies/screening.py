"""Which prompts lie further from the benign prompts of their class than these lie from each other.

After layer-wise feature analysis (Jebreel et al. 2023, arXiv 2302.12758), with its slips left out: each class has its
own layers and weights, no layer is taken where cohesion only falls, and no prompt is part of the mean that it is
compared with. Beside it stand what it must be compared with: the plain last layer, and a Mahalanobis distance over all
layers.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcrit.core.errors import UserError
from jaxcrit.criteria.cohesion_rise import large_classes, leave_one_out, rise
from jaxcrit.evaluation.intervals import auroc, auroc_difference, wilson

_TINY = 1e-9  # spread of cosines that float32 states cannot tell from none
_LEAST = 1e-6  # shrinkage, so that the covariance can be inverted


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a class is bounded.

    Attributes:
        layers: layers of every class; None for each class's layer of interest and the two before.
        tau: standard deviations below the mean at which the threshold lies.
        fpr: share of benign prompts below the threshold instead; 0 for none.
        normed: whether the last layer lies behind the final norm, and is no layer of interest.
    """

    layers: tuple[int, ...] | None = None
    tau: float = 2.5
    fpr: float = 0.0
    normed: bool = False

    def threshold(self, scores: np.ndarray) -> float:
        """The threshold of a class from its benign scores ``[n]``."""
        return float(np.quantile(scores, self.fpr) if self.fpr else scores.mean() - self.tau * scores.std())


@dataclasses.dataclass(frozen=True, eq=False)
class Bounds:
    """What is known of one class.

    Attributes:
        size: benign prompts n.
        interest: layer of interest; None where cohesion rises nowhere in the second half.
        layers: layers that the score is made of.
        weights: their weights, of sum 1.
        centroid: ``[L, D]`` mean state.
        mean: ``[L + 1]`` means of the benign cosines by layer, each with the mean of the others, and of the score.
        spread: ``[L + 1]`` standard deviations of the same.
        threshold: score below which a prompt is flagged.
    """

    size: int
    interest: int | None
    layers: tuple[int, ...]
    weights: np.ndarray
    centroid: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    threshold: float

    @classmethod
    def of(cls, states: np.ndarray, rule: Rule) -> Bounds:
        """Bounds of a class from its benign states ``[n, L, D]``."""
        cosines = leave_one_out(states)
        rises = rise(cosines.mean(axis=0))
        if rule.normed:
            rises[-1] = np.nan
        interest = layer_of_interest(rises)
        layers = layers_around(interest, len(rises)) if rule.layers is None else rule.layers
        weights = np.fmax(rises[list(layers)], 0)  # layer 0 has no rise
        weights = weights / weights.sum() if weights.sum() > 0 else np.full(len(layers), 1 / len(layers))
        whole = np.column_stack([cosines, cosines[:, list(layers)] @ weights])
        centroid = states.mean(axis=0, dtype=np.float64)
        mean, spread = whole.mean(axis=0), whole.std(axis=0)
        threshold = rule.threshold(whole[:, -1])
        return cls(len(states), interest, layers, weights, centroid, mean, spread, threshold)

    @property
    def cohesion(self) -> np.ndarray:
        """Mean cosine of each benign prompt with the mean of the others, ``[L]``."""
        return self.mean[:-1]

    def cosines(self, states: np.ndarray) -> np.ndarray:
        """Cosines with the centroid by layer, and behind them the score, their sum; ``[m, L, D]`` to ``[m, L + 1]``."""
        dots = np.einsum("mld,ld->ml", states, self.centroid, dtype=np.float64)
        squared = np.einsum("mld,mld->ml", states, states, dtype=np.float64) * (self.centroid**2).sum(axis=-1)
        found = np.divide(dots, np.sqrt(squared), out=np.zeros_like(dots), where=squared > 0)
        return np.column_stack([found, found[:, list(self.layers)] @ self.weights])


@dataclasses.dataclass(frozen=True, eq=False)
class Screen:
    """What benign prompts say of every class.

    Attributes:
        classes: bounds by class, the largest first.
        small: benign prompts of the classes that have too few, or whose prompts are all alike.
        distance: Mahalanobis distance from a class, over all layers.
        held_out: how many benign prompts the bounds of the other half of their class flag, and of how many.
    """

    classes: dict[Any, Bounds]
    small: dict[Any, int]
    distance: Distance
    held_out: tuple[int, int]

    @classmethod
    def of(cls, states: np.ndarray, labels: Sequence[Hashable], rule: Rule) -> Screen:
        """Learns the classes.

        Args:
            states: ``[N, L, D]`` float32, last-token states of benign prompts.
            labels: ``[N]`` class of each.
            rule: how a class is bounded.

        Raises:
            UserError: no class of 8 prompts or more, or all states of a layer are the same.
        """
        for layer in range(states.shape[1]):
            if (states[:, layer] == states[:1, layer]).all():
                raise UserError(f"layer {layer}: all {len(states)} benign states are the same; nothing to compare")
        places = large_classes(labels)
        bounds = {label: Bounds.of(states[rows], rule) for label, rows in places.items()}
        classes = {label: one for label, one in bounds.items() if one.spread[-1] > _TINY}
        if not classes:
            raise UserError(f"the prompts of each of the {len(bounds)} classes have equal states; nothing to compare")
        small = {label: size for label, size in Counter(labels).items() if label not in classes}
        apart = np.concatenate([states[places[label]] - one.centroid for label, one in classes.items()])
        flagged = count = 0
        for label in classes:
            for one, other in ((0, 1), (1, 0)):
                half, rest = states[places[label][one::2]], states[places[label][other::2]]
                of_half = Bounds.of(half, rule)
                flagged += int((of_half.cosines(rest)[:, -1] < of_half.threshold).sum())
                count += len(rest)
        return cls(classes, small, Distance.of(apart), (flagged, count))

    def rows(self, states: np.ndarray, labels: Sequence[Hashable]) -> list[dict[str, Any]]:
        """Judges prompts.

        Args:
            states: ``[M, L, D]`` last-token states.
            labels: ``[M]`` class of each.

        Returns:
            JSON values of each: ``score``, ``threshold``, ``z`` (standard deviations of the class's benign prompts
            from their mean), ``flagged`` and ``layers``, all null where the class is unknown; ``by_layer``, z of
            each layer alone, and ``distance``.
        """
        nothing = dict.fromkeys(("score", "threshold", "z", "flagged", "layers", "by_layer", "distance"))
        found: list[dict[str, Any]] = [dict(nothing) for _ in labels]
        for label in dict.fromkeys(label for label in labels if label in self.classes):
            one, mine = self.classes[label], [place for place, other in enumerate(labels) if other == label]
            cosines = one.cosines(states[mine])
            z = (cosines - one.mean) / (one.spread + _TINY)
            distances = self.distance(states[mine] - one.centroid)
            for place, score, each, distance in zip(mine, cosines[:, -1], z, distances, strict=True):
                found[place] = {
                    "score": float(score),
                    "threshold": one.threshold,
                    "z": float(each[-1]),
                    "flagged": bool(score < one.threshold),
                    "layers": list(one.layers),
                    "by_layer": each[:-1].tolist(),
                    "distance": float(distance),
                }
        return found


def layer_of_interest(rises: np.ndarray) -> int | None:
    """The layer of the second half in which cohesion rises most; None where it rises in none of them.

    Args:
        rises: ``[L]``, NaN where there is none.
    """
    half = len(rises) // 2
    best = half + int(np.argmax(np.where(np.isnan(rises[half:]), -np.inf, rises[half:])))
    return best if rises[best] > 0 else None


def layers_around(interest: int | None, num_layers: int) -> tuple[int, ...]:
    """The layer of interest and the two before; without one, the last but one and up to two before it."""
    if interest is not None:
        return tuple(range(max(0, interest - 2), interest + 1))
    return tuple(range(max(num_layers // 2, num_layers - 4), num_layers - 1)) or (num_layers - 1,)


@dataclasses.dataclass(frozen=True, eq=False)
class Distance:
    """Mahalanobis distance of a state, all its layers together, by the covariance that the classes share.

    The covariance of L D numbers is shrunk towards a multiple of the identity (Ledoit and Wolf 2004), and never made:
    with n prompts their n x n inner products do.

    Attributes:
        apart: ``[n, L, D]`` benign states less their class's mean, scaled.
        scale: ``[L]`` what each layer is divided by, so that all have the same variance.
        shrinkage: weight of the identity, from 0 to 1.
        floor: what it is multiplied by: the least variance of any direction.
        inner: ``[n, n]`` what the products with ``apart`` are weighed by.
    """

    apart: np.ndarray
    scale: np.ndarray
    shrinkage: float
    floor: float
    inner: np.ndarray

    @classmethod
    def of(cls, apart: np.ndarray) -> Distance:
        """The distance by states ``[n, L, D]`` less the means of their classes."""
        scale = np.sqrt((apart**2).mean(axis=(0, 2)))
        scale[scale == 0] = 1
        apart = apart / scale[:, None]
        count, size = len(apart), apart[0].size
        products = sum(layer @ layer.T for layer in apart.swapaxes(0, 1))
        own, square = np.diagonal(products), (products**2).sum() / count**2
        level = own.sum() / (count * size)
        off = square / size - level**2  # how far the covariance is from the identity's multiple, squared
        noise = ((own**2).sum() / count**2 - square / count) / size
        shrinkage = max(_LEAST, min(1.0, noise / off) if off > 0 else 1.0)
        floor = shrinkage * level
        inner = (1 - shrinkage) * np.linalg.inv(count * floor * np.eye(count) + (1 - shrinkage) * products)
        return cls(apart, scale, shrinkage, floor, inner)

    def __call__(self, apart: np.ndarray) -> np.ndarray:
        """Distances ``[m]`` of states ``[m, L, D]`` less the mean of their class (Woodbury's identity)."""
        apart = apart / self.scale[:, None]
        seen = sum(layer @ mine.T for layer, mine in zip(apart.swapaxes(0, 1), self.apart.swapaxes(0, 1), strict=True))
        squared = (apart**2).sum(axis=(1, 2)) - np.einsum("mi,ij,mj->m", seen, self.inner, seen, optimize=True)
        return np.sqrt(np.maximum(squared, 0) / self.floor)


def separation(rows: Sequence[Mapping[str, Any]], truth: Sequence[int]) -> dict[str, Any]:
    """How well scores tell rows of truth 1 from those of truth 0; rows of an unknown class are counted apart.

    Args:
        rows: what `Screen.rows` gives.
        truth: 0 or 1 of each.

    Returns:
        JSON values: counts, shares flagged with Wilson's interval, AUROC of every layer alone, of the score, of the
        last layer and of the distance, and the differences from the score to the last two, each with DeLong's interval.
    """
    known = [(row, one) for row, one in zip(rows, truth, strict=True) if row["flagged"] is not None]
    kinds = [[row for row, one in known if one == kind] for kind in (0, 1)]
    content: dict[str, Any] = {}
    for name, kind, mine in zip(("false_positives", "true_positives"), (0, 1), kinds, strict=True):
        flagged = sum(row["flagged"] for row in mine)
        unknown = sum(one == kind for one in truth) - len(mine)
        interval = wilson(flagged, len(mine)) if mine else None
        content[name] = {"flagged": flagged, "of": len(mine), "unknown": unknown, "interval": interval}

    def by(value: Any) -> tuple[np.ndarray, np.ndarray]:
        """Scores of both kinds, high for what should be flagged."""
        return np.array([value(row) for row in kinds[0]]), np.array([value(row) for row in kinds[1]])

    depth = len(known[0][0]["by_layer"]) if known else 0
    layers = [by(lambda row, layer=layer: -row["by_layer"][layer]) for layer in range(depth)]
    score, distance = by(lambda row: -row["z"]), by(lambda row: row["distance"])
    content["auroc"] = {"score": _told(auroc(*score)), "mahalanobis": _told(auroc(*distance))}
    content["auroc"]["layers"] = [_told(auroc(*layer)) for layer in layers]
    if known:
        content["auroc"]["last_layer"] = content["auroc"]["layers"][-1]
        content["score_less_last_layer"] = _told(auroc_difference(score, layers[-1]))
        content["score_less_mahalanobis"] = _told(auroc_difference(score, distance))
    return content


def _told(found: tuple[float, tuple[float, float]]) -> dict[str, Any]:
    return {"value": found[0], "interval": list(found[1])}
