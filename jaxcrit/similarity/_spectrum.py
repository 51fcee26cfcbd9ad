"""Principal components of every layer from its centred Gram, and how far two layers share them.

With the thin SVD of the centred activations ``X_c = U S V'``, the centred Gram is ``U S^2 U'``: one eigendecomposition
per layer gives all that comparing layers needs, and what remains per pair are products of the scores U. A direction in
the space of features is made on demand (`directions`).

Decompositions run in float64 on the host: float32 ones are off by several 1e-7 of the *largest* eigenvalue, and what
matters is the gap between neighbouring ones further down. What the float32 Gram itself leaves is below 1e-6 in mean
CCA (k up to 10), and 1e-5 where an outlier dimension makes the first eigenvalue 200 times the tenth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxcrit.core.errors import UserError, listed
from jaxcrit.similarity._grams import PackedGrams

# Eigenvalues below this share of the largest are the rounding of float32 Grams: measured 1e-8 to 1.3e-7 of it over
# N=20..1000, widths 4..600 and spectra from flat to k^-2.
_ROUNDING = 4 * float(np.finfo(np.float32).eps)


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """Principal components of L layers on N samples, most variance first; R = N-1 is the most there can be.

    Attributes:
        scores: ``[L, N, K]`` float64, unit left singular vectors U of the centred activations; of each, the entry
            largest in size is positive. Times the singular values they are the samples' coordinates.
        singular_values: ``[L, R]`` float64, all of them, 0 beyond the rank.
    """

    scores: np.ndarray
    singular_values: np.ndarray

    @property
    def num_samples(self) -> int:
        """N."""
        return self.scores.shape[1]

    @property
    def rank(self) -> np.ndarray:
        """``[L]`` components above the rounding of float32."""
        return np.asarray((self.singular_values > 0).sum(axis=1))

    @property
    def explained_variance(self) -> np.ndarray:
        """``[L, R]`` share of the variance that each component has."""
        eigenvalues = self.singular_values**2
        return eigenvalues / eigenvalues.sum(axis=1, keepdims=True)

    @property
    def participation_ratio(self) -> np.ndarray:
        """``[L]`` ``(sum of eigenvalues)^2 / sum of their squares``: how many directions carry a layer."""
        return 1 / (self.explained_variance**2).sum(axis=1)

    @property
    def effective_rank(self) -> np.ndarray:
        """``[L]`` ``exp`` of the entropy of ``s / sum(s)``, s the singular values (Roy and Vetterli 2007)."""
        return effective_rank(self.singular_values)

    @property
    def gaps(self) -> np.ndarray:
        """``[L, R]`` relative eigengap below each component, ``1 - s_{i+1}^2 / s_i^2``; 0 beyond the rank."""
        eigenvalues = self.singular_values**2
        following = np.pad(eigenvalues[:, 1:], ((0, 0), (0, 1)))
        return np.divide(eigenvalues - following, eigenvalues, out=np.zeros_like(eigenvalues), where=eigenvalues > 0)

    @property
    def sampling_gap(self) -> float:
        """The gap that other samples might close, ``sqrt(2 / N)``: the sampling error of an eigenvalue, relative to it.

        The rule of thumb of North et al. 1982. Below it, another draw of samples finds other components (any mixture of
        the neighbours), while the space that both span together may still be the same.
        """
        return float(np.sqrt(2 / self.num_samples))

    def separation(self, component: int) -> np.ndarray:
        """``[L]`` the smaller of the relative gaps above and below one component, counted from 0.

        A component is identified where this exceeds `sampling_gap`; the first k together are where ``gaps[:, k-1]``
        does.

        Raises:
            UserError: the component is beyond a layer's rank.
        """
        self.require(component + 1)
        eigenvalues = self.singular_values[:, component] ** 2
        below = self.gaps[:, component]
        if component == 0:
            return below
        return np.minimum(below, self.singular_values[:, component - 1] ** 2 / eigenvalues - 1)

    def require(self, components: int) -> None:
        """Refuses numbers of components that a layer does not have, or that were not kept.

        Raises:
            UserError: fewer than 1, beyond the rank, or beyond K.
        """
        if components < 1:
            raise UserError(f"expected at least 1 component, got {components}")
        if components > self.num_samples - 1:
            raise UserError(
                f"{components} components of {self.num_samples} samples: expected at most {self.num_samples - 1};"
                " give more prompts, or ask for fewer"
            )
        short = np.flatnonzero(self.rank < components).tolist()
        if short:
            raise UserError(
                f"layers {listed(short)}: expected at most {self.rank.min()} components, the rank of layer"
                f" {self.rank.argmin()}, got {components}; ask for fewer"
            )
        if components > self.scores.shape[2]:
            raise UserError(f"expected at most the {self.scores.shape[2]} components that were kept, got {components}")


def effective_rank(singular_values: np.ndarray) -> np.ndarray:
    """``exp`` of the entropy of ``s / sum(s)``, ``[L, R]`` to ``[L]`` (Roy and Vetterli 2007); NaN where all are 0."""
    with np.errstate(invalid="ignore"):
        shares = singular_values / singular_values.sum(axis=1, keepdims=True)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return np.exp(-(shares * logs).sum(axis=1))


def decompose(
    grams: Any, components: int | None = None, *, progress: Callable[[int], object] | None = None
) -> Spectrum:
    """Decomposes every layer's centred Gram, once.

    By `numpy.linalg.eigh`: one core takes 7 ms each at N=300, 0.17 s at N=1,000.

    Args:
        grams: ``[L, N, N]`` centred Grams.
        components: K, how many scores to keep; None for all R, which errors and `procrustes` need.
        progress: called with 1 after each layer.

    Raises:
        UserError: not Grams, NaN in them, or more components than N-1.
    """
    grams = grams if isinstance(grams, PackedGrams) else np.asarray(grams)
    if len(grams.shape) != 3 or grams.shape[1] != grams.shape[2] or grams.shape[1] < 2:
        raise UserError(f"expected Grams [layers, samples, samples], got {grams.shape}")
    broken = [layer for layer, gram in enumerate(grams) if not np.isfinite(gram).all()]
    if broken:
        raise UserError(f"layers {listed(broken)}: the Grams hold NaN or infinity")
    most = grams.shape[1] - 1
    kept = most if components is None else components
    if not 1 <= kept <= most:
        raise UserError(
            f"{kept} components of {grams.shape[1]} samples: expected 1 to {most}; give more prompts, or ask for fewer"
        )
    scores = np.empty((len(grams), grams.shape[1], kept))
    values = np.empty((len(grams), most))
    for layer, gram in enumerate(grams):
        eigenvalues, vectors = np.linalg.eigh(gram.astype(np.float64))
        ordered, top = eigenvalues[:0:-1], vectors[:, : -1 - kept : -1]
        values[layer] = np.sqrt(np.where(ordered > _ROUNDING * ordered[0], ordered, 0))
        largest = np.take_along_axis(top, np.abs(top).argmax(axis=0)[None], axis=0)
        scores[layer] = np.where(largest < 0, -top, top)
        if progress:
            progress(1)
    return Spectrum(scores, values)


def directions(hidden: Any, scores: np.ndarray, singular_values: np.ndarray) -> np.ndarray:
    """Turns scores into directions in the space of features: ``V' = S^-1 U' X_c``, rows of unit length.

    Args:
        hidden: ``[..., N, D]`` activations that the (linear) Gram was made of.
        scores: ``[..., N, k]`` of a `Spectrum`.
        singular_values: ``[..., k]`` of the same components, none of them 0.

    Returns:
        ``[..., k, D]`` float32. ``X_c @ V`` are the samples' coordinates ``scores * singular_values``.
    """
    centred = np.asarray(hidden, np.float64)
    centred = centred - centred.mean(axis=-2, keepdims=True)
    return (np.swapaxes(scores / singular_values[..., None, :], -1, -2) @ centred).astype(np.float32)


def canonical_correlations(spectrum: Spectrum, k: int, other: Spectrum | None = None) -> np.ndarray:
    """Canonical correlations between the first k principal components of all pairs of layers.

    In closed form: the singular values of ``U_x' U_y`` ``[k, k]``, since CCA does not see how its inputs are scaled. An
    iterative solver run on the scores (scikit-learn's, as in the paper) agrees within its tolerance.

    Args:
        spectrum: spectrum of L layers.
        k: components on each side.
        other: spectrum of L' layers of a second model, on the same samples in the same order.

    Returns:
        ``[L, L', k]`` float64, largest first.

    Raises:
        UserError: k beyond the rank of a layer, or other samples.
    """
    left, right = _top(spectrum, k), _top(other or spectrum, k)
    if left.shape[1] != right.shape[1]:
        raise UserError(f"expected the same samples on both sides, got {left.shape[1]} and {right.shape[1]}")
    return np.minimum(np.linalg.svd(_cross(left, right), compute_uv=False), 1)


def cca(spectrum: Spectrum, k: int, other: Spectrum | None = None) -> np.ndarray:
    """Mean of the `canonical_correlations`: ``[L, L']``; exactly 1 for a layer with itself.

    Two unrelated layers score about ``0.85 sqrt(k / N)`` for k well below N (the mean of the quarter-circle law, 8/3π).
    """
    values = canonical_correlations(spectrum, k, other).mean(axis=2)
    if other is None:
        np.fill_diagonal(values, 1.0)
    return values


def cca_without_each(spectrum: Spectrum, k: int) -> np.ndarray:
    """`cca` with each sample deleted in turn, to first order: ``[N, L, L]`` float64.

    The infinitesimal jackknife, ``value - influence_m / (N-1)``; decomposing N times over would cost N times as much.
    Deleting sample m moves the canonical correlations of given scores (Romanazzi 1992: with unit-variance canonical
    variates a and b, ``a_m b_m - rho (a_m^2 + b_m^2) / 2`` each), and turns the components themselves:
    ``du_i = N u_mi sum_{j>k} u_j u_mj s_j^2 / (s_i^2 - s_j^2)``, of which the part along the other side's canonical
    variates counts. Where the gap below component k is small, that second part is large: rightly, for the k components
    are then an accident of these samples, but a linear approximation is no longer close.

    Args:
        spectrum: with all R scores kept.
        k: components on each side.

    Raises:
        UserError: as `canonical_correlations`; or not all scores were kept.
    """
    spectrum.require(k)
    if spectrum.scores.shape[2] < spectrum.num_samples - 1:
        raise UserError(f"expected all {spectrum.num_samples - 1} scores, got {spectrum.scores.shape[2]}")
    top, count = _top(spectrum, k), spectrum.num_samples
    values, turned, moved = [], [], []
    for layer, scores in enumerate(spectrum.scores):
        a, rho, b = np.linalg.svd(_cross(top[layer][None], top)[0])
        b = b.swapaxes(1, 2)
        ours, theirs = top[layer] @ a, top @ b
        values.append(rho.mean(axis=1))
        root = rho[:, None, :]
        moved.append((ours * theirs - root * (ours**2 + theirs**2) / 2).sum(axis=2))
        kept, left = np.split(spectrum.singular_values[layer] ** 2, [k])
        with np.errstate(divide="ignore", invalid="ignore"):  # equal eigenvalues on both sides of k: no error bar
            along = scores[:, k:].T @ (theirs @ a.swapaxes(1, 2))
            turn = left[:, None] / (kept - left[:, None])
            turned.append((top[layer] * (scores[:, k:] @ (along * turn))).sum(axis=2))
    turn_both = np.array(turned) + np.array(turned).swapaxes(0, 1)
    influence = count / k * (np.array(moved) + turn_both)
    return np.moveaxis(np.array(values)[:, :, None] - influence / (count - 1), 2, 0)


def _top(spectrum: Spectrum, k: int) -> np.ndarray:
    spectrum.require(k)
    return spectrum.scores[:, :, :k]


def _cross(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """``U_x' U_y`` of all pairs: ``[L, N, k]``, ``[L', N, k']`` -> ``[L, L', k, k']``, in one product."""
    flat = [np.moveaxis(side, 1, 0).reshape(side.shape[1], -1) for side in (left, right)]
    product = flat[0].T @ flat[1]
    return product.reshape(len(left), left.shape[2], len(right), right.shape[2]).swapaxes(1, 2)
