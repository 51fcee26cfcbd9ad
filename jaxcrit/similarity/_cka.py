"""Centred kernel alignment between all layers, biased (the paper's) or debiased."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jaxcrit.core.errors import UserError, listed
from jaxcrit.similarity._forms import RESIDENT_SAMPLES
from jaxcrit.similarity._grams import DegenerateError, Kernel, Tables, sweep
from jaxcrit.similarity._tiled import tiled

Bias = Literal["biased", "debiased"]


def cka(hidden: Any, *, kernel: Kernel = "linear", bias: Bias = "biased", other: Any = None) -> np.ndarray:
    """Similarity of every layer with every other, from activations.

    At N=300 samples of width 4,096 two unrelated layers score 0.93 by the biased estimator; look at ``null_mean`` or
    use ``debiased``, whose mean on unrelated layers is 0 (and which may therefore be negative).

    Args:
        hidden: ``[L, N, D]`` activations.
        kernel: ``linear`` or ``rbf`` (bandwidth: median of each layer's squared distances).
        bias: ``biased`` (Kornblith et al. 2019; the paper) or ``debiased`` (HSIC_1 of Song et al. 2012).
        other: ``[L', N, D']`` activations of a second model on the same samples in the same order.

    Returns:
        ``[L, L]`` float64, or ``[L, L']`` with ``other``.

    Raises:
        DegenerateError: fewer than 4 samples, NaN or infinity, a constant layer, repeated samples.

    Example:
        >>> hidden = np.random.default_rng(0).standard_normal((3, 20, 8), dtype=np.float32)
        >>> cka(hidden, bias="debiased").shape
        (3, 3)
    """
    if kernel == "linear" and other is None and np.shape(hidden)[1:2] > (RESIDENT_SAMPLES,):
        array = jnp.asarray(hidden)
        if len(array.devices()) == 1:
            return from_tables(tiled(array, sums=True), bias)
    return from_tables(sweep(hidden, kernel=kernel, other=other), bias)


def from_tables(tables: Tables, bias: Bias = "biased") -> np.ndarray:
    """CKA from the tables of a sweep: ``[L, L]`` float64, or ``[L, L']`` where two models are compared.

    NaN outside the band of a banded sweep.

    Raises:
        DegenerateError: debiased, where a layer's samples are all equally far apart (0/0).
    """
    values = normalised(hsic(tables, bias))
    return tables.pairs(values)


def hsic(tables: Tables, bias: Bias) -> np.ndarray:
    """The inner products that CKA normalises, ``[L, L]`` float64, of all layers of both sides.

    With G0 = G - diag(d), cross = <G0, G0'>, and t = sum(d), whose negative is the sum of G0:
    biased ``cross + d.d'``; debiased (Song et al. 2012, Eq. 5, up to the common factor 1/(N(N-3)))
    ``cross + t t'/((N-1)(N-2)) - 2/(N-2) d.d'``.
    """
    cross, aligned, trace = tables.cross, tables.aligned, tables.trace
    biased = cross + aligned
    if bias == "biased":
        return biased
    if bias != "debiased":
        raise UserError(f"bias={bias!r}: expected 'biased' or 'debiased'")
    n = tables.num_samples
    debiased = cross + np.outer(trace, trace) / ((n - 1) * (n - 2)) - 2 / (n - 2) * aligned
    # Float32 leaves about 1e-13 of the biased value where the exact one is 0.
    flat = np.flatnonzero(debiased.diagonal() < 1e-10 * biased.diagonal()).tolist()
    if flat:
        raise DegenerateError(f"layers {listed(flat)}: all samples are equally far apart; debiased CKA is 0/0", flat)
    return debiased


def normalised(products: np.ndarray) -> np.ndarray:
    """``H_ij / sqrt(H_ii H_jj)`` of ``[..., L, L]``; the diagonal is exactly 1."""
    norms = np.sqrt(np.diagonal(products, axis1=-2, axis2=-1))
    values = products / (norms[..., :, None] * norms[..., None, :])
    layers = np.arange(products.shape[-1])
    values[..., layers, layers] = 1.0
    return values
