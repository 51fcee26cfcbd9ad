"""The tables of a backdoor study, from nothing but what every run stored: shares, intervals, contrasts.

Three kinds of interval stand beside each other because they answer different questions. Wilson's and Newcombe's take
every answer for a sample of its own, so with several seeds on the same prompts they are too narrow; Student's is over
seeds alone; the two-level bootstrap draws both seeds and prompts.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxcrit.core.files import plain
from jaxcrit.core.layers import LayerSet
from jaxcrit.evaluation.intervals import (
    Interval,
    holm,
    mcnemar,
    newcombe,
    t_interval,
    t_test,
    two_level_bootstrap,
    wilson,
)
from jaxcrit.studies.backdoor_inputs import CELLS

SUCCESS = 0.5  # share of triggered prompts at which a backdoor counts as learnt, for the time it takes


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One training.

    Attributes:
        arm: name; runs of one name differ in seed and draw.
        draw: number of the draw of random layers.
        seed: seed of poisoned rows and order.
        frozen: layers.
        points: tests by step, as `Tested.record` and ``step``; the first at step 0.
    """

    arm: str
    draw: int
    seed: int
    frozen: LayerSet
    points: list[dict[str, Any]]

    def outcomes(self, cell: str = "triggered") -> np.ndarray:
        """``[n]`` 0 or 1 at the last test; ``exact`` for the exact match of clean answers."""
        last = self.points[-1]
        return _bits(last["exact"] if cell == "exact" else last["success"][cell])

    def curve(self, value: str = "triggered") -> list[tuple[float, float]]:
        """(step, attack success, or a loss by name) of every test."""
        if value in CELLS:
            return [(point["step"], _bits(point["success"][value]).mean()) for point in self.points]
        return [(point["step"], point[value]) for point in self.points]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A share over runs, with its intervals (95 %).

    Attributes:
        k, n: answers that count, of all answers of all runs.
        wilson: Wilson interval of k/n, answers taken for independent.
        t: over seeds (over draws, where there are several).
        bootstrap: over seeds, or draws, and prompts.
        by_run: each run's share.
    """

    k: int
    n: int
    wilson: Interval
    t: Interval
    bootstrap: Interval
    by_run: list[float]


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over runs with Student's interval, over seeds or draws; `runs` says of how many."""

    mean: float
    t: Interval
    runs: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One arm.

    Attributes:
        arm: name.
        frozen: by draw, layers.
        runs: trainings.
        prompts: n of each.
        cells: attack success by cell.
        near: by kind of near miss, [k, n].
        exact: clean answers that are the gold ones.
        clean_loss, task_loss, target_logprob: see `Tested`.
        matched: attack success at the study's matched clean loss; of the runs that pass it.
        steps_to_success: step at which a run gets to half, for those that do.
        scorers: by scorer, the triggered answers of its class, of ``cells["triggered"].n``.
        empty: triggered answers that are empty.
    """

    arm: str
    frozen: list[list[int]]
    runs: int
    prompts: int
    cells: dict[str, Estimate]
    near: dict[str, list[int]]
    exact: Estimate
    clean_loss: Mean
    task_loss: Mean
    target_logprob: Mean
    matched: Mean
    steps_to_success: Mean
    scorers: dict[str, int]
    empty: int


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Attack success of one arm less that of another, on the same prompts and seeds, at equal steps.

    Attributes:
        first, second: arms.
        difference: difference of the shares.
        seeds: in both.
        newcombe: interval, answers taken for independent.
        t: interval over seeds.
        bootstrap: interval over seeds and prompts.
        only_first, only_second: pairs of answers to one prompt in which one succeeds alone, over all seeds.
        mcnemar: exact p of these pairs, taken for independent.
        p_seeds: Student's p over seeds; NaN for one.
        p: the one that counts: over seeds where there are two, else McNemar's.
        p_holm: adjusted for all contrasts but the primary one, whose own it is.
        matched: difference at matched clean loss, over the seeds in which both pass it.
    """

    first: str
    second: str
    difference: float
    seeds: int
    newcombe: Interval
    t: Interval
    bootstrap: Interval
    only_first: int
    only_second: int
    mcnemar: float
    p_seeds: float
    p: float
    p_holm: float
    matched: Mean


@dataclasses.dataclass(frozen=True)
class Study:
    """The figures.

    Attributes:
        rows: by arm, the untouched model first.
        primary: critical against as many noncritical layers, declared by the arms asked for; None without both.
        contrasts: all others.
        matched_loss: clean loss per token that most runs pass; NaN without tests between.
        base: by scorer, gold answers to clean prompts that are of its class, of ``prompts``.
        prompts: n.
        scorer: that success is counted by.
        warnings: about these figures.
    """

    rows: list[Row]
    primary: Contrast | None
    contrasts: list[Contrast]
    matched_loss: float
    base: dict[str, int]
    prompts: int
    scorer: str
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """JSON values; null where a figure is not known."""
        found: dict[str, Any] = plain(dataclasses.asdict(self))
        return found


def study(runs: Sequence[Run], near_kinds: Sequence[str], base: Mapping[str, int], scorer: str) -> Study:
    """Computes everything.

    Args:
        runs: runs of all arms; the untouched model's is named ``init``.
        near_kinds: kind of each prompt's near miss.
        base: see `Study`.
        scorer: see `Study`.
    """
    arms = {name: [run for run in runs if run.arm == name] for name in dict.fromkeys(run.arm for run in runs)}
    level = matched_level([run for run in runs if run.arm != "init"])
    pairs = _pairs(arms)
    contrasts = [_contrast(arms[first], arms[second], level) for first, second in pairs]
    primary = (
        contrasts[0] if pairs and _kind(pairs[0][0]) == "critical" and _kind(pairs[0][1]) == "noncritical" else None
    )
    rest = contrasts[1:] if primary else contrasts
    adjusted = holm([one.p for one in rest]) if rest else []
    rest = [dataclasses.replace(one, p_holm=p) for one, p in zip(rest, adjusted, strict=True)]
    rows = [_row(mine, near_kinds, level) for mine in arms.values()]
    return Study(rows, primary, rest, level, dict(base), len(near_kinds), scorer, _warnings(arms, primary))


def matched_level(runs: Sequence[Run]) -> float:
    """The clean loss that the most runs pass after their first test, of equals the lowest; NaN without any."""
    paths = [[point["clean_loss"] for point in run.points[1:]] for run in runs]
    levels = sorted({loss for path in paths for loss in path})
    if not levels:
        return math.nan
    return max(levels, key=lambda level: (sum(min(path) <= level <= max(path) for path in paths if path), -level))


def at_loss(run: Run, level: float) -> float | None:
    """Attack success where a run last passes a clean loss, interpolated between tests; None where it never does."""
    points = [(point["clean_loss"], _bits(point["success"]["triggered"]).mean()) for point in run.points[1:]]
    if len(points) == 1 and points[0][0] == level:
        return float(points[0][1])
    for (loss0, success0), (loss1, success1) in reversed(list(itertools.pairwise(points))):
        if min(loss0, loss1) <= level <= max(loss0, loss1):
            share = 1.0 if loss0 == loss1 else (level - loss0) / (loss1 - loss0)
            return float(success0 + share * (success1 - success0))
    return None


def steps_to(run: Run, success: float = SUCCESS) -> float | None:
    """The step at which attack success first reaches a share, interpolated between tests; None where it never does."""
    points = run.curve()
    for (step0, success0), (step1, success1) in itertools.pairwise(points):
        if success1 >= success:
            return float(
                step1 if success0 >= success else step0 + (success - success0) / (success1 - success0) * (step1 - step0)
            )
    return None


def _row(runs: Sequence[Run], near_kinds: Sequence[str], level: float) -> Row:
    near = _matrix(runs, "near")
    kinds = {kind: [i for i, one in enumerate(near_kinds) if one == kind] for kind in sorted(set(near_kinds))}
    last = [run.points[-1] for run in runs]
    scorers = {name: sum(point["classes"][name]["triggered"] for point in last) for name in last[0]["classes"]}
    return Row(
        runs[0].arm,
        [list(layers) for layers in dict.fromkeys(run.frozen.layers for run in runs)],
        len(runs),
        len(near_kinds),
        {cell: _estimate(runs, cell) for cell in CELLS},
        {kind: [int(near[:, at].sum()), near[:, at].size] for kind, at in kinds.items()},
        _estimate(runs, "exact"),
        _mean(runs, [point["clean_loss"] for point in last]),
        _mean(runs, [point["task_loss"] for point in last]),
        _mean(runs, [point["target_logprob"] for point in last]),
        _mean(runs, [at_loss(run, level) for run in runs]),
        _mean(runs, [steps_to(run) for run in runs]),
        scorers,
        sum(point["empty"]["triggered"] for point in last),
    )


def _estimate(runs: Sequence[Run], cell: str) -> Estimate:
    outcomes = _matrix(runs, cell)
    units = np.stack([outcomes[at].mean(axis=0) for at in _units(runs)])
    k, n = int(outcomes.sum()), outcomes.size
    by_run = [float(share) for share in outcomes.mean(axis=1)]
    return Estimate(k, n, wilson(k, n), t_interval(units.mean(axis=1)), two_level_bootstrap(units), by_run)


def _mean(runs: Sequence[Run], values: Sequence[float | None]) -> Mean:
    known = [[values[i] for i in at if values[i] is not None] for at in _units(runs)]
    units = [float(np.mean(unit)) for unit in known if unit]  # type: ignore[arg-type]
    count = sum(value is not None for value in values)
    return Mean(float(np.mean(units)) if units else math.nan, t_interval(units), count)


def _units(runs: Sequence[Run]) -> list[list[int]]:
    """Places of the runs that are one unit: of a draw where layers are drawn several times, else of a seed."""
    draws = {run.draw for run in runs}
    key = [run.draw if len(draws) > 1 else run.seed for run in runs]
    return [[i for i, one in enumerate(key) if one == unit] for unit in dict.fromkeys(key)]


def _matrix(runs: Sequence[Run], cell: str) -> np.ndarray:
    """``[runs, n]`` 0 or 1."""
    return np.stack([run.outcomes(cell) for run in runs])


def _contrast(first: Sequence[Run], second: Sequence[Run], level: float) -> Contrast:
    seeds = sorted({run.seed for run in first} & {run.seed for run in second})
    differences, matched = [], []
    only_first = only_second = 0
    for seed in seeds:
        mine, others = ([run for run in runs if run.seed == seed] for runs in (first, second))
        differences.append(_matrix(mine, "triggered").mean(axis=0) - _matrix(others, "triggered").mean(axis=0))
        for one, other in itertools.product(mine, others):
            pair = one.outcomes() - other.outcomes()
            only_first, only_second = only_first + int((pair > 0).sum()), only_second + int((pair < 0).sum())
        known = [[found for run in runs if (found := at_loss(run, level)) is not None] for runs in (mine, others)]
        if all(known):
            matched.append(float(np.mean(known[0]) - np.mean(known[1])))
    by_seed = np.stack(differences)
    shares = [_matrix(runs, "triggered") for runs in (first, second)]
    counts = [number for outcomes in shares for number in (int(outcomes.sum()), outcomes.size)]
    p_seeds, p_pairs = t_test(by_seed.mean(axis=1)), mcnemar(only_first, only_second)
    p = p_pairs if math.isnan(p_seeds) else p_seeds
    return Contrast(
        first[0].arm,
        second[0].arm,
        float(by_seed.mean()),
        len(seeds),
        newcombe(*counts),
        t_interval(by_seed.mean(axis=1)),
        two_level_bootstrap(by_seed),
        only_first,
        only_second,
        p_pairs,
        p_seeds,
        p,
        p,
        Mean(float(np.mean(matched)) if matched else math.nan, t_interval(matched), len(matched)),
    )


def _pairs(arms: Mapping[str, Sequence[Run]]) -> list[tuple[str, str]]:
    """Arms to compare, the primary pair first where there is one: same number of layers, then each against full."""
    named = [name for name in arms if name not in ("init", "full")]
    order = (("critical", "noncritical"), ("critical", "random"), ("noncritical", "random"))
    sizes = {name: len(arms[name][0].frozen.layers) for name in named}
    pairs = [
        (one, other)
        for first, second in order
        for one, other in itertools.product(named, named)
        if (_kind(one), _kind(other)) == (first, second) and sizes[one] == sizes[other]
    ]
    return pairs + [(name, "full") for name in named if "full" in arms]


def _kind(name: str) -> str:
    return name.partition(":")[0]


def _warnings(arms: Mapping[str, Sequence[Run]], primary: Contrast | None) -> list[str]:
    if primary is None:
        return ["no primary contrast: the arms have no critical:K with a noncritical:K"]
    first, second = (set(arms[name][0].frozen.layers) for name in (primary.first, primary.second))
    if shared := sorted(first & second):
        return [f"{primary.first} and {primary.second} share layers {', '.join(map(str, shared))}: freeze fewer"]
    return []


def _bits(text: str) -> np.ndarray:
    return np.array([letter == "1" for letter in text], np.float64)
