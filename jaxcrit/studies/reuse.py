"""Which layers to recompute when another model's keys and values are reused: sets to try, front, choice, controls.

Pure functions of the damage of each set to each row (`jaxcrit.evidence.reuse`). The rows are dealt in turn into two
halves: one chooses, the other says what the choice is worth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxcrit.evidence.reuse import MEASURES, one_reused, sources
from jaxcrit.models.config import ModelConfig

Set = tuple[int, ...]
_DRAWS = 2000
_LADDER = 10  # counts at which the most damaging layers are recomputed


@dataclasses.dataclass(frozen=True, eq=False)
class Sets:
    """Sets of layers to recompute, in the order of the plan: none, then all contiguous groups, then random sets.

    Attributes:
        recomputed: the sets; every first and every last layer of a group occurs.
        groups: how many of them are none or a group.
        plan: ``[V, L]`` int: the receiver's own cache, each layer reused alone, then the sets.
        pairs: sets of two groups, which stand behind the groups; none at first.
    """

    recomputed: tuple[Set, ...]
    groups: int
    plan: np.ndarray
    pairs: int = 0

    @property
    def candidates(self) -> int:
        """How many of the sets may be chosen."""
        return self.groups + self.pairs

    def with_pairs(self, pairs: Sequence[Set]) -> Sets:
        """These sets and pairs of groups; the plan stays."""
        made = (*self.recomputed[: self.groups], *pairs, *self.recomputed[self.groups :])
        return dataclasses.replace(self, recomputed=made, pairs=len(pairs))


def pairs_with(first: Set, num_layers: int) -> list[Set]:
    """A group together with each further one that it does not touch."""
    groups = [range(a, b) for a in range(num_layers) for b in range(a + 1, num_layers + 1)]
    apart = [group for group in groups if group[-1] + 1 < first[0] or group[0] > first[-1] + 1]
    return [tuple(sorted({*first, *group})) for group in apart]


def sets_to_try(num_layers: int, random: int, seed: int) -> Sets:
    """All groups, and random sets whose sizes are spread evenly over 1 to L-1.

    Args:
        num_layers: L.
        random: number of random sets.
        seed: seed of the draws.
    """
    groups = [tuple(range(a, b)) for a in range(num_layers) for b in range(a + 1, num_layers + 1)]
    rng = np.random.default_rng(seed)
    sizes = np.rint(np.linspace(1, num_layers - 1, random)).astype(int)
    drawn = [tuple(sorted(rng.permutation(num_layers)[:size].tolist())) for size in sizes]
    sets = ((), *groups, *drawn)
    alone = [one_reused(num_layers, layer) for layer in range(num_layers)]
    own = np.zeros(num_layers, int)
    return Sets(sets, 1 + len(groups), np.stack([own, *alone, *(sources(num_layers, one) for one in sets)]))


def most_damaging(damage: np.ndarray) -> list[Set]:
    """The n layers of most damage, as they lie, for up to ten counts n; ``damage`` is ``[L]`` of each reused alone."""
    order, depth = np.argsort(-damage, kind="stable"), len(damage)
    counts = sorted({round(count) for count in np.linspace(1, depth - 1, min(_LADDER, depth - 1))})
    return [tuple(sorted(order[:count].tolist())) for count in counts]


def halves(num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to choose by and rows to test on, dealt in turn."""
    return np.arange(0, num_rows, 2), np.arange(1, num_rows, 2)


def best_of_each_size(sets: Sequence[Set], damage: np.ndarray, choose: np.ndarray) -> list[int]:
    """By count of recomputed layers 0 to L, place of the set of just so many that does least; arguments of `front`."""
    sizes, means = np.array([len(one) for one in sets]), damage[:, choose].mean(axis=1)
    return [int(np.flatnonzero(sizes == size)[means[sizes == size].argmin()]) for size in range(sizes.max() + 1)]


def front(sets: Sequence[Set], damage: np.ndarray, choose: np.ndarray) -> list[int]:
    """By count of recomputed layers 0 to L, place of the set of at most so many that does least damage.

    Args:
        sets: none, all groups, and pairs of groups where there are some.
        damage: ``[V, N]`` of these sets.
        choose: rows that choose.
    """
    means, best = damage[:, choose].mean(axis=1), best_of_each_size(sets, damage, choose)
    for size in range(1, len(best)):
        if means[best[size]] >= means[best[size - 1]]:
            best[size] = best[size - 1]
    return best


def bounds(damage: np.ndarray, rows: np.ndarray, seed: int, level: float) -> np.ndarray:
    """Quantile ``[V]`` of the mean damage ``[V, N]`` over draws of these rows (bootstrap)."""
    weights = np.random.default_rng(seed).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), _DRAWS)
    return np.quantile(weights @ damage[:, rows].T / len(rows), level, axis=0)


def choice(best: Sequence[int], upper: np.ndarray, tolerance: float) -> int:
    """The least count whose set on the front has its upper bound within the tolerance; all layers always have.

    Args:
        best: the front.
        upper: ``[V]`` upper bounds on the rows that choose.
        tolerance: damage that is accepted, in nats.
    """
    return next(count for count, place in enumerate(best) if count == len(best) - 1 or upper[place] <= tolerance)


def told(measures: np.ndarray, rows: np.ndarray, seed: int) -> list[dict[str, float]]:
    """Of every variant, its damage to some rows.

    Args:
        measures: ``[4, V, N]``, as `jaxcrit.evidence.reuse.Damage` has them.
        rows: which rows.
        seed: seed of the bootstrap.

    Returns:
        By variant ``kl`` (nats), its ``stderr`` and 95 % interval ``low`` to ``high``, ``top1``, ``first`` and
        ``answer`` (shares, see `jaxcrit.evidence.reuse.MEASURES`).
    """
    mine = measures[:, :, rows]
    ends = [bounds(measures[0], rows, seed, level) for level in (0.025, 0.975)]
    spread = mine[0].std(axis=1, ddof=1) / np.sqrt(len(rows))
    names = (*MEASURES, "stderr", "low", "high")
    return [
        dict(zip(names, map(float, values), strict=True))
        for values in zip(*mine.mean(axis=2), spread, *ends, strict=True)
    ]


def sent(config: ModelConfig, layers: Set, itemsize: int) -> int:
    """Bytes of one prefix token that the sender must hand over: keys and values of each reused layer, and the stream
    that enters each run of recomputed layers, unless it begins at layer 0."""
    runs = (sources(config.num_layers, layers) == np.arange(config.num_layers)).sum() - (0 in layers)
    reused = config.num_layers - len(layers)
    return int((reused * 2 * config.num_kv_heads * config.head_dim + runs * config.width) * itemsize)


def identical(distances: np.ndarray) -> int:
    """Leading layers whose keys and values are equal to the bit in every row; ``[L, N]`` 1 where they are."""
    equal = (distances == 1).all(axis=1)
    return len(equal) if equal.all() else int(equal.argmin())


def studied(
    config: ModelConfig,
    sets: Sets,
    measures: np.ndarray,
    worst: Sequence[Set],
    of_worst: np.ndarray,
    distances: np.ndarray,
    *,
    tolerance: float,
    seed: int,
    itemsize: int,
) -> dict[str, Any]:
    """The study as JSON values: every set's damage, the front with its controls, the choice.

    Args:
        config: shape of the models.
        sets: sets that were tried.
        measures: ``[4, V, N]`` of the plan of ``sets``, pairs at their place.
        worst: sets of most damaging layers.
        of_worst: ``[4, W, N]`` of these.
        distances: ``[5, L, N]``.
        tolerance: damage that is accepted, in nats.
        seed: seed of the bootstrap.
        itemsize: bytes of a number in a cache.
    """
    depth = config.num_layers
    choose, test = halves(measures.shape[2])
    mine = measures[:, 1 + depth :]
    chosen_by, tested = told(mine, choose, seed), told(mine, test, seed)
    best = front(sets.recomputed[: sets.candidates], mine[0, : sets.candidates], choose)
    place_of: Mapping[Set, int] = {one: place for place, one in enumerate(sets.recomputed)}
    random = range(sets.candidates, len(sets.recomputed))

    def entry(layers: Set, on_choose: Mapping[str, float], on_test: Mapping[str, float]) -> dict[str, Any]:
        return {
            "layers": list(layers),
            "recomputed": len(layers) / depth,
            "bytes_per_token": sent(config, layers, itemsize),
            "choose": dict(on_choose),
            "test": dict(on_test),
        }

    def of(place: int) -> dict[str, Any]:
        return entry(sets.recomputed[place], chosen_by[place], tested[place])

    def less(one: int, other: int) -> list[float]:
        difference = mine[0, one] - mine[0, other]
        ends = [float(bounds(difference[None], test, seed, level)[0]) for level in (0.025, 0.975)]
        return [float(difference[test].mean()), *ends]

    lines = []
    for count, place in enumerate(best):
        first = place_of[tuple(range(count))]
        begun = [at for at in range(1, sets.groups) if len(sets.recomputed[at]) == count and sets.recomputed[at][0]]
        later = min(begun, key=lambda at: chosen_by[at]["kl"], default=None)
        last = place_of[tuple(range(depth - count, depth))]
        lines.append(
            {
                "count": count,
                "best": of(place),
                "first": of(first),
                "last": of(last),
                "later": None if later is None else of(later),
                "best_less_first": less(place, first),
            }
        )
    upper = bounds(mine[0], choose, seed, 0.95)
    count = choice(best, upper, tolerance)
    found = of(best[count])
    on = told(of_worst, choose, seed), told(of_worst, test, seed)
    return {
        "rows": {"choose": len(choose), "test": len(test)},
        "reused": of(0),
        "identical": identical(distances[-1]),
        "choice": {**found, "upper": float(upper[best[count]]), "tolerance": tolerance},
        "front": lines,
        "groups": [of(place) for place in range(1, sets.groups)],
        "random": [of(place) for place in random],
        "most_damaging": [entry(one, *both) for one, *both in zip(worst, *on, strict=True)],
    }
