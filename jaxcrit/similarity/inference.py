"""How far a CKA value can be trusted: its null mean, its deletion values, and how many dimensions carry a layer."""

from __future__ import annotations

import numpy as np

from jaxcrit.core.errors import UserError
from jaxcrit.similarity.cka import Bias, hsic, normalised
from jaxcrit.similarity.grams import GramTables


def null_mean(tables: GramTables) -> np.ndarray:
    """The exact mean of biased CKA when the samples of one side are permuted at random.

    ``tr G tr G' / ((N-1) |G| |G'|)`` (the first moment of Kazi-Aoual et al. 1995; no resampling).

    Returns:
        ``[L, L]`` float64, or ``[L, L']`` where two models are compared.
    """
    relative = tables.diagonals.sum(axis=1) / np.sqrt(hsic(tables, "biased").diagonal())
    return tables.pairs(np.outer(relative, relative) / (tables.num_samples - 1))


def participation_ratio(tables: GramTables) -> np.ndarray:
    """``(sum of eigenvalues)^2 / sum of their squares`` of each centred Gram: ``[L]`` float64, from 1 to N-1.

    The number of directions that carry a layer. Two unrelated layers of ratio P score about P/(P+N) by biased CKA.
    """
    return tables.diagonals.sum(axis=1) ** 2 / hsic(tables, "biased").diagonal()


def cka_without_each(tables: GramTables, bias: Bias = "biased") -> np.ndarray:
    """CKA of all pairs with each sample deleted in turn, exactly, from the Grams of all samples.

    Deleting sample m takes its row and column out of the Gram and centres again; with r = ``rows[m]``, d_m the diagonal
    entries and n = N-1 samples left, the inner products become

    - biased: ``H - 2r - d_m d_m' - 2r/n + d_m d_m'/n^2``,
    - debiased: Eq. 5 of Song et al. 2012 with ``cross - 2r``, ``t - 2 d_m``, and ``d.d' - d_m d_m' + r`` plus
      ``weighted[m]`` and its mirror image for the inner product of the row sums.

    For the RBF kernel the bandwidth stays that of all samples.

    Returns:
        ``[N, L, L]`` float64, or ``[N, L, L']`` where two models are compared.

    Raises:
        UserError: debiased with fewer than 5 samples (4 must be left).
    """
    n = tables.num_samples - 1
    own = tables.diagonals.T[:, :, None] * tables.diagonals.T[:, None, :]
    rows = tables.rows
    if bias == "biased":
        products = hsic(tables, bias) - 2 * rows * (1 + 1 / n) - own * (1 - 1 / n**2)
    elif n < 4:
        raise UserError(f"expected at least 5 samples to delete one of, got {n + 1}; give more prompts")
    else:
        trace = tables.diagonals.sum(axis=1) - 2 * tables.diagonals.T
        cross = rows.sum(axis=0) - 2 * rows
        aligned = own.sum(axis=0) - own + rows + tables.weighted + tables.weighted.swapaxes(1, 2)
        totals = trace[:, :, None] * trace[:, None, :]
        products = cross + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * aligned
    return tables.pairs(normalised(products))
