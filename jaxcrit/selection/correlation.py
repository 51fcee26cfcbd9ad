"""Whether two scores rank the layers of a model alike, with tests that neighbouring layers' likeness does not fool.

Functions take two vectors of one value per layer, ``[L]``, and leave out layers where either is not finite. A window
of layers, and the smooth drift of a residual stream, make neighbouring values alike. L layers are then far fewer than L
independent observations: of unrelated scores averaged over windows of 5 layers, the usual p calls over a quarter
significant at 0.05 (benchmarks/correlation_null.py).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence

import numpy as np

from jaxcrit.core.deletions import Deletions
from jaxcrit.core.errors import UserError
from jaxcrit.core.layers import LayerScores, LayerSet
from jaxcrit.core.selections import span

FEW_LAYERS = 8
SIGNIFICANT = 0.05
ALIKE = 0.95  # two scores that correlate so are shown as one in a matrix
_ROUNDING = 1e-12  # two orders of equal correlation differ by this much


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Of two scores over the layers that both are valid for.

    Attributes:
        num_layers: V, how many layers both are valid for.
        first: the lowest of them.
        last: the highest of them.
        rho: Spearman's.
        tau: Kendall's (tau-b).
        p_naive: p of rho, as if the layers were independent (Student's t).
        p_shift: p of rho, among all circular shifts; never below 1/V.
        p_block: p of rho, among permutations of blocks of layers.
        block: layers to a block.
        partial: Spearman's given the layer index; NaN where a score is itself monotone in depth.
        p_partial: p of partial, among all circular shifts of what depth leaves.
        depth: Spearman's of either score with the layer index.
        smallest: least |rho| that would be significant at 0.05 if the layers were independent.
        interval: 95 % of rho over other draws of the samples; None where the scores carry no deletions.
    """

    num_layers: int
    first: int
    last: int
    rho: float
    tau: float
    p_naive: float
    p_shift: float
    p_block: float
    block: int
    partial: float
    p_partial: float
    depth: tuple[float, float]
    smallest: float
    interval: tuple[float, float] | None = None


def correlate(
    a: LayerScores,
    b: LayerScores,
    *,
    block: int | None = None,
    seed: int = 0,
    circular: bool = False,
) -> Correlation:
    """Correlates two scores of one model as they are: a low δ against a high loss gives a negative rho.

    Args:
        a: score of L layers; the interval takes its deletions where it has them.
        b: score of the same layers.
        block: layers to a block of the permutation; by default twice the wider of the scores' windows; of
            unrelated scores of 28 layers, blocks of one window call 7 % significant at 0.05, of two 3 %.
        seed: seed of the permutations and the interval.
        circular: accept a `circle`.

    Raises:
        UserError: a circle, different L, fewer than 3 layers valid in both, or a score that is constant over them.
    """
    if a.num_layers != b.num_layers:
        raise UserError(
            f"expected scores of one model, got {a.name} of {a.num_layers} layers and {b.name} of {b.num_layers}"
        )
    if not circular and (why := circle(a, b)):
        raise UserError(
            f"{why}; train every layer (finetune --layers=all) and test it on rows it has not seen, or give --circular"
            " to see the numbers all the same"
        )
    both = a.valid & b.valid
    layers, x, y = np.flatnonzero(both), a.values[both], b.values[both]
    if len(layers) < 3:
        raise UserError(
            f"{a.name} and {b.name}: expected at least 3 layers that both are valid for, got {len(layers)}"
            f" ({_span(a)} and {_span(b)})"
        )
    for score, values in ((a, x), (b, y)):
        if np.ptp(values) == 0:
            raise UserError(f"{score.name}: has the same value {values[0]:.4g} in all {len(x)} layers; nothing to rank")
    block = block or 2 * max(int(score.meta.get("window") or 1) for score in (a, b))
    partial, p_partial = partial_given_depth(x, y, layers)
    kept = a.deletions, b.deletions
    left = [None if one is None else Deletions(one.values[:, both], one.sample_ids) for one in kept]
    return Correlation(
        num_layers=len(layers),
        first=int(layers[0]),
        last=int(layers[-1]),
        rho=spearman(x, y),
        tau=kendall(x, y),
        p_naive=naive_p(x, y),
        p_shift=circular_shift_p(x, y),
        p_block=block_permutation_p(x, y, block, seed=seed),
        block=block,
        partial=partial,
        p_partial=p_partial,
        depth=(spearman(x, layers), spearman(y, layers)),
        smallest=smallest_significant(len(layers)),
        interval=jackknife_interval(x, y, left[0], left[1], seed=seed),
    )


def circle(a: LayerScores, b: LayerScores) -> str:
    """Why two scores cannot be evidence for each other, or nothing.

    A score of a model of which only some layers were trained is high there because they were trained. Correlated with
    the score that chose these layers it shows the choice, whatever the layers are worth.
    """
    for one, other in ((a, b), (b, a)):
        trained = one.meta.get("trained") or {}
        mine = [key for key in trained.get("criteria", ()) if _stem(key) == _stem(other.name)]
        if mine:
            return (
                f"{one.name} and {other.name}: only layers {span(trained['layers'])} of the tuned model were trained,"
                f" chosen by {mine[0]} ({', '.join(trained['rules'])}), so the two agree whatever layers are worth"
            )
    return ""


def _stem(key: str) -> str:
    """What a score measures, by whichever estimator."""
    return key.removesuffix("_debiased").removesuffix("_per_token")


def tied(values: np.ndarray) -> float:
    """Share of values that others equal, ``[V]``."""
    return float(np.mean((values[:, None] == values[None, :]).sum(axis=1) > 1)) if len(values) else 0.0


def meaning(pair: Correlation, scores: Sequence[LayerScores], names: Sequence[str]) -> str:
    """What sign and p say of the claim that the layers critical by one score are critical by the other.

    Args:
        pair: correlation of the two.
        scores: both.
        names: names of both.
    """
    (a, b), (first, second) = scores, names
    agree = (pair.rho < 0) == (a.direction != b.direction)
    said = (
        f"ρ {pair.rho:+.2f}: layers that are critical by {first} ({a.direction} values) tend to be"
        f" {'critical' if agree else 'uncritical'} by {second} ({b.direction} values)"
    )
    if not pair.p_shift < SIGNIFICANT:
        return f"{said}, but {pair.p_shift:.0%} of the circular shifts correlate as strongly: no evidence of it here."
    if not pair.p_partial < SIGNIFICANT:
        return f"{said}, but given depth ({pair.partial:+.2f}, p {pair.p_partial:.2f}) there is no evidence of it here."
    return (
        f"{said}; {pair.p_shift:.1%} of the circular shifts correlate as strongly, and given depth"
        f" {pair.partial:+.2f} is left (p {pair.p_partial:.3f}): evidence of it, in this model."
    )


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation, equal values sharing the middle of their ranks; NaN where either is constant."""
    x, y = _paired(x, y)
    return float(_unit_ranks(x) @ _unit_ranks(y))


def kendall(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's tau-b; NaN where either is constant."""
    from scipy.stats import kendalltau

    return float(kendalltau(*_paired(x, y)).statistic)


def naive_p(x: np.ndarray, y: np.ndarray) -> float:
    """Two-sided p of Spearman's rho as if the layers were independent (Student's t), as the paper prints it."""
    from scipy.stats import spearmanr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a constant score has no rho; NaN says so
        return float(spearmanr(*_paired(x, y)).pvalue)


def circular_shift_p(x: np.ndarray, y: np.ndarray) -> float:
    """Two-sided p of Spearman's rho among all V circular shifts of one score against the other.

    A shift keeps each score's likeness between neighbours and breaks the tie between the two. Exact over all shifts,
    the identity included: p is a multiple of 1/V and never below it, so that fewer than 20 layers cannot reach 0.05.
    Assumes that a score behaves alike at all depths: uniform for averages over windows, but 15 % of unrelated random
    walks come out below 0.05 (benchmarks/correlation_null.py). Where both drift with depth, p says that they share the
    drift. Layers are taken in order; one that is invalid in the middle is passed over.

    Args:
        x: ``[L]``.
        y: ``[L]``.

    Returns:
        p in [1/V, 1]; NaN where either is constant.
    """
    x, y = _paired(x, y)
    return _shift_p(_unit_ranks(x), _unit_ranks(y))


def block_permutation_p(x: np.ndarray, y: np.ndarray, block: int, *, draws: int = 4999, seed: int = 0) -> float:
    """Two-sided p of Spearman's rho among reorderings of one score in blocks of neighbouring layers.

    The score is turned by a random number of layers, cut into blocks, and the blocks are put in random order; the last
    is shorter where V is no multiple. Finer than the shifts, but every seam between blocks breaks likeness that the
    data had, so p is too small where values are alike over more layers than a block holds.

    Args:
        x: ``[L]``.
        y: ``[L]``.
        block: layers to a block; no fewer than the window that the values average over.
        draws: random reorderings.
        seed: seed of the reorderings.

    Returns:
        p in [1/(draws+1), 1]; NaN where either is constant.

    Raises:
        UserError: a block of no layers.
    """
    if block < 1:
        raise UserError(f"block={block}: expected at least 1 layer")
    x, y = _paired(x, y)
    rx, ry = _unit_ranks(x), _unit_ranks(y)
    count = len(x)
    cuts = np.arange(count) // block
    rng = np.random.default_rng(seed)
    # Sorting by a random key per block, ties in order, reorders whole blocks.
    keys = rng.random((draws, cuts[-1] + 1))[:, cuts]
    order = np.argsort(keys, axis=1, kind="stable")
    order = (order + rng.integers(count, size=(draws, 1))) % count
    return _share(np.abs(ry[order] @ rx), abs(float(rx @ ry)), extra=1)


def partial_given_depth(x: np.ndarray, y: np.ndarray, layers: np.ndarray | None = None) -> tuple[float, float]:
    """Spearman's partial correlation given the layer index, and its circular-shift p.

    Pearson's correlation of what is left of the ranks after a straight line in depth; a hump that both scores have is
    still in it.

    Args:
        x: ``[L]``.
        y: ``[L]``.
        layers: ``[L]`` index of each; by default 0 to L-1.

    Returns:
        The correlation and p; both NaN where either score is constant or monotone in depth, which leaves nothing.
    """
    x, y, depth = _paired(x, y, np.arange(len(x)) if layers is None else layers)
    left = [given_depth(values, depth) for values in (x, y)]
    return float(left[0] @ left[1]), _shift_p(left[0], left[1])


def given_depth(values: np.ndarray, layers: np.ndarray) -> np.ndarray:
    """What a straight line in depth leaves of the ranks of finite values, of length 1; NaN where it leaves nothing.

    Args:
        values: ``[..., V]``.
        layers: ``[V]`` index of each.
    """
    ranks, along = _unit_ranks(values), _unit_ranks(layers)
    return _unit(ranks - (ranks @ along)[..., None] * along)


def jackknife_interval(
    x: np.ndarray,
    y: np.ndarray,
    without_x: Deletions | None,
    without_y: Deletions | None,
    *,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Where Spearman's rho would lie with other samples of the same kind.

    Multiplier (infinitesimal-jackknife) bootstrap, as in `selection_probability`: every sample gets a random weight,
    all layers move together, and samples that both scores were measured on weigh the same in both. The plain jackknife
    of rho would be wrong, for ranks move in steps. Says nothing about other layers or models.

    Args:
        x: ``[L]``.
        y: ``[L]``.
        without_x: deletions of x, None where there are none: x then stands still.
        without_y: the same for y.
        draws: weights drawn.
        level: confidence level of the interval.
        seed: seed of the weights.

    Returns:
        Lower and upper end by percentiles; None where neither score carries deletions, or without some sample too few
        layers have a value.
    """
    known = sorted({str(i) for one in (without_x, without_y) if one is not None for i in one.sample_ids})
    if not known:
        return None
    place = {sample: index for index, sample in enumerate(known)}
    weights = np.random.default_rng(seed).standard_normal((draws, len(known)))
    drawn = []
    for values, left in ((x, without_x), (y, without_y)):
        drawn.append(np.broadcast_to(values, (draws, len(values))))
        if left is not None:
            count = len(left.values)
            influence = (left.values.mean(axis=0) - left.values) * np.sqrt((count - 1) / count)
            drawn[-1] = values + weights[:, [place[str(i)] for i in left.sample_ids]] @ influence
    inside = np.isfinite(drawn[0][0]) & np.isfinite(drawn[1][0])
    if inside.sum() < 2:
        return None
    rho = np.einsum("dv,dv->d", *(_unit_ranks(one[:, inside]) for one in drawn))
    low, high = np.quantile(rho, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def smallest_significant(num_layers: int, alpha: float = 0.05) -> float:
    """Least |rho| that a two-sided t test of V independent layers would call significant; likeness asks for more."""
    from scipy.stats import t

    if num_layers < 3:
        return math.nan
    quantile = float(t.ppf(1 - alpha / 2, num_layers - 2))
    return quantile / math.sqrt(num_layers - 2 + quantile**2)


def spearman_matrix(scores: Sequence[LayerScores]) -> np.ndarray:
    """Spearman's correlation between all scores, each pair over the layers that both are valid for.

    Args:
        scores: M of one model; one whose direction is ``high`` is turned round, so that 1 always means agreement.

    Returns:
        ``[M, M]``; NaN where a score is constant, or a pair has fewer than 3 layers in common.

    Raises:
        UserError: none given, or of different numbers of layers.
    """
    layers = {score.num_layers for score in scores}
    if len(layers) != 1:
        raise UserError(f"expected scores of one model, got {sorted(layers) or 'none'} layers")
    turned = [
        np.where(score.valid, score.values if score.direction == "low" else -score.values, np.nan) for score in scores
    ]

    def entry(a: np.ndarray, b: np.ndarray) -> float:
        return spearman(a, b) if (np.isfinite(a) & np.isfinite(b)).sum() >= 3 else math.nan

    matrix = np.empty((len(turned), len(turned)))
    for i, a in enumerate(turned):
        matrix[i, : i + 1] = matrix[: i + 1, i] = [entry(a, b) for b in turned[: i + 1]]
    return matrix


def near_duplicates(matrix: np.ndarray, least: float = ALIKE) -> dict[int, int]:
    """By score, the first before it that ranks the layers alike, which stands for it.

    Args:
        matrix: ``[M, M]`` Spearman's correlation.
        least: correlation from which on two scores are taken for one.
    """
    stands: dict[int, int] = {}
    for one, row in enumerate(matrix):
        alike = [other for other in range(one) if other not in stands and row[other] >= least]
        if alike:
            stands[one] = max(alike, key=lambda other: row[other])
    return stands


def overlap_matrix(chosen: Sequence[LayerSet]) -> np.ndarray:
    """``[M, M]`` share of the layers of the smaller set that both sets hold."""
    sets = [set(one.layers) for one in chosen]
    return np.array([[len(a & b) / max(1, min(len(a), len(b))) for b in sets] for a in sets])


def _paired(*columns: np.ndarray) -> list[np.ndarray]:
    """The columns where all are finite, in order."""
    arrays = [np.asarray(column, np.float64) for column in columns]
    inside = np.logical_and.reduce([np.isfinite(array) for array in arrays])
    return [array[inside] for array in arrays]


def _unit_ranks(values: np.ndarray) -> np.ndarray:
    """Centred ranks of length 1 along the last axis of ``[..., V]``; NaN where constant."""
    from scipy.stats import rankdata

    ranks = rankdata(values, axis=-1)
    return _unit(ranks - ranks.mean(axis=-1, keepdims=True))


def _unit(centred: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(centred, axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(length > _ROUNDING * centred.shape[-1], centred / length, np.nan)


def _shift_p(x: np.ndarray, y: np.ndarray) -> float:
    shifts = (np.arange(len(y))[:, None] + np.arange(len(y))) % max(1, len(y))
    return _share(np.abs(y[shifts] @ x), abs(float(x @ y)))


def _share(others: np.ndarray, found: float, extra: int = 0) -> float:
    """Share of ``others`` (and ``extra`` that count as large) that reach what was found."""
    if not math.isfinite(found):
        return math.nan
    return (int((others >= found - _ROUNDING).sum()) + extra) / (len(others) + extra)


def _span(score: LayerScores) -> str:
    layers = np.flatnonzero(score.valid)
    return f"{score.name}: {f'{layers[0]}-{layers[-1]}' if len(layers) else 'none'}"
