"""How far a CKA value can be trusted: its null, its deletion values, and how many dimensions carry a layer."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxcrit.core.errors import UserError
from jaxcrit.similarity._cka import Bias, from_tables, hsic
from jaxcrit.similarity._grams import GramSums, GramTables, Tables


def null_mean(tables: Tables) -> np.ndarray:
    """The exact mean of biased CKA when the samples of one side are permuted at random.

    ``tr G tr G' / ((N-1) |G| |G'|)`` (the first moment of Kazi-Aoual et al. 1995; no resampling).

    Returns:
        ``[L, L]`` float64, or ``[L, L']`` where two models are compared.
    """
    relative = tables.trace / np.sqrt(hsic(tables, "biased").diagonal())
    return tables.pairs(np.outer(relative, relative) / (tables.num_samples - 1))


def null_variance(tables: Tables) -> np.ndarray:
    """The exact variance of biased CKA when the samples of one side are permuted at random.

    The second moment of Kazi-Aoual et al. 1995, from trace, norm and diagonal of each Gram alone: with T = tr G,
    Q = |G|^2 and S = sum of G_mm^2, the variance of <G, G'> is

        2 A A' / ((N-1)^2 (N+1) (N-2)) + B B' / ((N+1) N (N-1) (N-2) (N-3)),

    A = (N-1) Q - T^2 and B = N(N+1) S - (N-1) (T^2 + 2 Q).

    Returns:
        ``[L, L]`` float64, or ``[L, L']`` where two models are compared.
    """
    n = tables.num_samples
    norm = hsic(tables, "biased").diagonal()
    trace, squares = tables.trace, tables.aligned.diagonal()
    # Of Grams of norm 1, whose inner product is the CKA.
    spectral = ((n - 1) * norm - trace**2) / norm
    leverage = (n * (n + 1) * squares - (n - 1) * (trace**2 + 2 * norm)) / norm
    first = 2 * np.outer(spectral, spectral) / ((n - 1) ** 2 * (n + 1) * (n - 2))
    second = np.outer(leverage, leverage) / ((n + 1) * n * (n - 1) * (n - 2) * (n - 3))
    return tables.pairs(first + second)


@dataclasses.dataclass(frozen=True, eq=False)
class PermutationNull:
    """CKA beside what it would be if the samples of one side were permuted; each ``[L, L]`` or ``[L, L']`` float64.

    Attributes:
        mean: mean of biased CKA over all permutations, exact.
        stddev: over all permutations, exact.
        score: (biased CKA - mean) / stddev.
        p: chance of a biased CKA as high, by the gamma distribution of this mean and variance (which a sum of
            weighted squares nearly follows; Gretton et al. 2008 use it for HSIC).
    """

    mean: np.ndarray
    stddev: np.ndarray
    score: np.ndarray
    p: np.ndarray


def permutation_null(tables: Tables) -> PermutationNull:
    """Mean, deviation, calibrated score and p of every pair, without permuting anything.

    Layers of one network are never independent of each other, so that p of neighbours is 0 for all practical
    purposes; it says something about layers far apart, of two models, or of very few samples. The samples must be
    exchangeable: tokens of one prompt are not.
    """
    from scipy.special import gammaincc

    values, mean, variance = from_tables(tables), null_mean(tables), null_variance(tables)
    # Permuting does nothing where all samples are equally far apart: 0/0, and no evidence.
    with np.errstate(invalid="ignore", divide="ignore"):
        score = (values - mean) / np.sqrt(variance)
        p = gammaincc(mean**2 / variance, values * mean / variance)
    return PermutationNull(mean, np.sqrt(variance), score, p)


def participation_ratio(tables: Tables) -> np.ndarray:
    """``(sum of eigenvalues)^2 / sum of their squares`` of each centred Gram: ``[L]`` float64, from 1 to N-1.

    The number of directions that carry a layer. Two unrelated layers of ratio P score about P/(P+N) by biased CKA.
    """
    return tables.trace**2 / hsic(tables, "biased").diagonal()


def cka_without_each(tables: Tables, bias: Bias = "biased", *, reach: int | None = None) -> np.ndarray:
    """CKA of all pairs with each sample deleted in turn, exactly, from the Grams of all samples.

    Deleting sample m takes its row and column out of the Gram and centres again; with r = ``rows[m]``, d_m the diagonal
    entries and n = N-1 samples left, the inner products become

    - biased: ``H - 2r - d_m d_m' - 2r/n + d_m d_m'/n^2``,
    - debiased: Eq. 5 of Song et al. 2012 with ``cross - 2r``, ``t - 2 d_m``, and ``d.d' - d_m d_m' + r`` plus
      ``weighted[m]`` and its mirror image for the inner product of the row sums.

    For the RBF kernel the bandwidth stays that of all samples.

    Args:
        tables: tables of a sweep.
        bias: which estimate of CKA.
        reach: for one model, only the pairs of layers at most so far apart; the others are left 0. A window of 5 of 32
            layers takes a quarter of the time.

    Returns:
        ``[N, L, L]`` float64, or ``[N, L, L']`` where two models are compared.

    Raises:
        UserError: debiased with fewer than 5 samples (4 must be left), or sums without rows.
    """
    if isinstance(tables, GramSums):
        raise UserError(
            "deleting samples takes rows of Grams, and the feature-space and streamed forms have none; use the"
            " resident or tiled form (--form=tiled), or go without errors"
        )
    n = tables.num_samples - 1
    i, j = _wanted(tables, reach)
    diagonals = tables.diagonals.T
    rows, own = _of(tables.rows, i, j), diagonals[:, i] * diagonals[:, j]
    if bias == "biased":
        products = hsic(tables, bias)[i, j] - 2 * (1 + 1 / n) * rows - (1 - 1 / n**2) * own
    elif n < 4:
        raise UserError(f"expected at least 5 samples to delete one of, got {n + 1}; give more prompts")
    else:
        trace = diagonals.sum(axis=0) - 2 * diagonals
        cross = tables.cross[i, j] - 2 * rows
        aligned = tables.aligned[i, j] - own + rows + 2 * _of(tables.weighted, i, j)
        products = cross + trace[:, i] * trace[:, j] / ((n - 1) * (n - 2)) - 2 / (n - 2) * aligned
    norms = np.sqrt(products[:, i == j])
    values = products / (norms[:, i] * norms[:, j])
    values[:, i == j] = 1.0
    deleted = np.zeros(tables.rows.shape)
    deleted[:, i, j] = values
    deleted[:, j, i] = values
    return tables.pairs(deleted)


def _of(rows: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """The mean of ``[N, L, L]`` at (i, j) and (j, i), ``[N, P]`` float64."""
    depth = rows.shape[1]
    flat = rows.reshape(len(rows), -1)
    return (flat[:, i * depth + j].astype(np.float64) + flat[:, j * depth + i]) / 2


def _wanted(tables: GramTables, reach: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of layers i <= j that are asked for, and each layer with itself, whose norm they need."""
    layers, left = np.arange(len(tables.diagonals)), tables.num_left
    apart = layers - layers[:, None]
    wanted = (apart >= 0) & (apart <= (len(layers) if reach is None else reach))
    if left is not None:
        wanted &= (apart == 0) | ((layers[:, None] < left) & (layers >= left))
    i, j = np.nonzero(wanted)
    return i, j
