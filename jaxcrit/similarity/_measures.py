"""Measures of how alike layers are other than CKA, from the same centred Grams or from their spectra.

All are 1 for a layer with itself, and do not change when a layer is rotated or scaled as a whole, or the samples are
put in another order. None is corrected for chance; each says what unrelated layers score. PWCCA is not among them: its
weights are sums of absolute values over the original dimensions, which a Gram does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrit.core.errors import UserError, did_you_mean, listed
from jaxcrit.similarity._grams import DegenerateError
from jaxcrit.similarity._spectrum import Spectrum, cca, decompose

NEIGHBOURS, COMPONENTS, VARIANCE = 10, 10, 0.99


def procrustes(
    spectrum: Spectrum, other: Spectrum | None = None, *, progress: Callable[[int], object] | None = None
) -> np.ndarray:
    """Orthogonal Procrustes similarity: ``|X_c' Y_c|_* / (|X_c| |Y_c|)``, the nuclear over the Frobenius norms.

    With both sides of unit norm, the least squared distance over all rotations is ``2 - 2 * similarity`` (Schönemann
    1966; Ding et al. 2021), and the arc cosine is the angular shape distance of Williams et al. 2021. The singular
    values of ``X_c' Y_c`` are those of ``S_x U_x' U_y S_y``. Unrelated layers score high where N is below the width, as
    with biased CKA. One N x N singular value decomposition per pair: 7 ms of one core at N=300, 0.3 s at N=1,000.

    Args:
        spectrum: spectrum of L layers, all scores kept.
        other: spectrum of L' layers of a second model, on the same samples in the same order.
        progress: called with 1 after each layer.

    Returns:
        ``[L, L']`` float64 in [0, 1].

    Raises:
        UserError: not all scores were kept, or other samples.
    """
    sides = [_coordinates(spectrum), _coordinates(other or spectrum)]
    if spectrum.num_samples != (other or spectrum).num_samples:
        raise UserError(
            f"expected the same samples on both sides, got {spectrum.num_samples} and {other and other.num_samples}"
        )
    values = np.ones((len(sides[0]), len(sides[1])))
    for i, left in enumerate(sides[0]):
        for j in range(0 if other else i + 1, len(sides[1])):
            values[i, j] = np.linalg.svd(left.T @ sides[1][j], compute_uv=False).sum()
            if other is None:
                values[j, i] = values[i, j]
        if progress:
            progress(1)
    return np.minimum(values, 1)


def rsa(grams: Any, other: Any = None, *, ranks: bool = False) -> np.ndarray:
    """Representational similarity analysis (Kriegeskorte et al. 2008): correlation of the layers' distance matrices.

    Distances are squared Euclidean, ``G_ii + G_jj - 2 G_ij`` for i < j. Unrelated layers score about 0.

    Args:
        grams: ``[L, N, N]`` centred Grams.
        other: ``[L', N, N]`` of a second model, on the same samples in the same order.
        ranks: Spearman's correlation instead of Pearson's; the same for distances and their squares.

    Returns:
        ``[L, L']`` float64 in [-1, 1].

    Raises:
        DegenerateError: all samples of a layer are equally far apart.
        UserError: other samples.
    """
    left = _standardised(_distances(grams), ranks)
    right = left if other is None else _standardised(_distances(other), ranks)
    if left.shape[1] != right.shape[1]:
        raise UserError("expected the same samples on both sides")
    values = np.clip(left @ right.T, -1, 1)
    if other is None:
        np.fill_diagonal(values, 1.0)
    return values


def knn(grams: Any, other: Any = None, *, neighbours: int = NEIGHBOURS) -> np.ndarray:
    """Mutual nearest neighbours (Huh et al. 2024): the share of a sample's nearest ones that two layers agree on.

    By Euclidean distance, the sample itself left out, ties to the lower index; mean over the samples. Unrelated layers
    score ``neighbours / (N-1)``.

    Args:
        grams: ``[L, N, N]`` centred Grams.
        other: ``[L', N, N]`` of a second model, on the same samples in the same order.
        neighbours: how many of each sample.

    Returns:
        ``[L, L']`` float64 in [0, 1].

    Raises:
        UserError: not fewer neighbours than other samples, or other samples.
    """
    left = _nearest(grams, neighbours)
    right = left if other is None else _nearest(other, neighbours)
    if left.shape[1] != right.shape[1]:
        raise UserError("expected the same samples on both sides")
    return (left @ right.T).astype(np.float64) / (neighbours * grams.shape[1])


def svcca(spectrum: Spectrum, other: Spectrum | None = None, *, variance: float = VARIANCE) -> np.ndarray:
    """SVCCA (Raghu et al. 2017): mean canonical correlation of the components that explain a share of the variance.

    Of layers with k_x and k_y such components the mean is over ``min(k_x, k_y)``. As in `jaxcrit.similarity.cca`,
    chance is about ``0.85 sqrt(k / N)``: with many components, every pair of layers scores high.

    Args:
        spectrum: spectrum of L layers, all scores kept.
        other: spectrum of L' layers of a second model, on the same samples in the same order.
        variance: share to explain, in (0, 1].

    Returns:
        ``[L, L']`` float64 in [0, 1].

    Raises:
        UserError: not all scores were kept, other samples, or a share outside (0, 1].
    """
    if not 0 < variance <= 1:
        raise UserError(f"variance={variance}: expected a share in (0, 1]")
    left, right = _leading(spectrum, variance), _leading(other or spectrum, variance)
    if spectrum.num_samples != (other or spectrum).num_samples:
        raise UserError("expected the same samples on both sides")
    values = np.array([[np.linalg.svd(x.T @ y, compute_uv=False).mean() for y in right] for x in left])
    return np.minimum(values, 1)


def unit_rows(hidden: Any, samples: np.ndarray | None = None) -> jax.Array:
    """Activations whose rows have unit length, for a CKA that no sample far out can carry alone (``--normalize=row``).

    Every sample counts by its direction from the origin, as in Huh et al. 2024; centring follows, in the Gram. Rows are
    normalised one by one, so the errors of everything that follows stay those of independent samples. Where dimensions
    that are large in every sample make up most of a row's length, little changes.

    Args:
        hidden: ``[L, N, D]`` activations.
        samples: ``[N]`` int, what errors call each; negative for what is none. By default counted from 0.

    Returns:
        ``[L, N, D]`` float32.

    Raises:
        DegenerateError: a row of zeros, which has no direction.
    """
    hidden = jnp.asarray(hidden, jnp.float32)
    scaled = hidden / jnp.maximum(jnp.abs(hidden).max(axis=2, keepdims=True), jnp.finfo(jnp.float32).tiny)
    lengths = jnp.linalg.norm(scaled, axis=2, keepdims=True)
    samples = np.arange(hidden.shape[1]) if samples is None else samples
    layers, places = np.nonzero(np.asarray(lengths[..., 0] == 0) & (samples >= 0))
    if layers.size:
        named = samples[places]
        raise DegenerateError(
            f"layer {layers[0]}: {listed(named[layers == layers[0]].tolist())} are samples of zeros, which have no"
            " direction to normalise; leave --normalize=row out",
            sorted(set(layers.tolist())),
            sorted(set(named.tolist())),
        )
    return scaled / lengths


# name: (from the spectrum, else from the Grams; function)
MEASURES: Mapping[str, tuple[bool, Callable[..., np.ndarray]]] = {
    "procrustes": (True, procrustes),
    "rsa": (False, rsa),
    "rsa_spearman": (False, lambda grams: rsa(grams, ranks=True)),
    "knn": (False, knn),
    "cca": (True, lambda spectrum: cca(spectrum, COMPONENTS)),
    "svcca": (True, svcca),
}


def parse_measures(text: str) -> tuple[str, ...]:
    """Reads names with commas.

    Raises:
        UserError: an unknown name, or one given twice.
    """
    names = tuple(name.strip() for name in text.split(",")) if text else ()
    for name in names:
        if name not in MEASURES:
            raise UserError(f"--measures: unknown {name!r}{did_you_mean(name, MEASURES)}; known: {', '.join(MEASURES)}")
    if len(set(names)) < len(names):
        raise UserError(f"--measures={text}: expected each name once")
    return names


def measure(
    grams: Any, names: Iterable[str], *, progress: Callable[[int], object] | None = None
) -> dict[str, np.ndarray]:
    """Several measures between all layers of one model; their spectra are computed once.

    Args:
        grams: ``[L, N, N]`` centred Grams.
        names: some of `MEASURES`; ``knn`` counts 10 neighbours, ``cca`` 10 components, ``svcca`` those that explain 99
            % of the variance.
        progress: called with a number of layers as each measure goes on.

    Returns:
        Name -> ``[L, L]`` float64.

    Raises:
        UserError: too few samples, or components beyond the rank of a layer.
    """
    found: dict[str, np.ndarray] = {}
    spectrum: Spectrum | None = None
    for name in names:
        spectral, function = MEASURES[name]
        if spectral and spectrum is None:
            spectrum = decompose(grams)
        if name == "procrustes":
            found[name] = function(spectrum, progress=progress)
            continue
        found[name] = function(spectrum if spectral else grams)
        if progress:
            progress(len(grams))
    return found


def _coordinates(spectrum: Spectrum) -> list[np.ndarray]:
    """``U S / |S|`` of each layer, ``[N, rank]``: its samples in the basis of its components, of unit norm."""
    if spectrum.scores.shape[2] < spectrum.num_samples - 1:
        raise UserError(f"expected all {spectrum.num_samples - 1} scores, got {spectrum.scores.shape[2]}")
    return [
        scores[:, :rank] * (values[:rank] / np.linalg.norm(values))
        for scores, values, rank in zip(spectrum.scores, spectrum.singular_values, spectrum.rank, strict=True)
    ]


def _leading(spectrum: Spectrum, variance: float) -> list[np.ndarray]:
    """The first scores of each layer that explain a share of its variance."""
    if spectrum.scores.shape[2] < spectrum.num_samples - 1:
        raise UserError(f"expected all {spectrum.num_samples - 1} scores, got {spectrum.scores.shape[2]}")
    explained = np.cumsum(spectrum.explained_variance, axis=1)
    counts = np.minimum((explained < variance - 1e-12).sum(axis=1) + 1, spectrum.rank)
    return [scores[:, :count] for scores, count in zip(spectrum.scores, counts, strict=True)]


def _squared_distances(gram: np.ndarray) -> np.ndarray:
    gram = gram.astype(np.float64)
    diagonal = gram.diagonal()
    return np.asarray(diagonal[:, None] + diagonal[None, :] - 2 * gram)


def _distances(grams: Any) -> np.ndarray:
    """Upper triangles of the squared distances, ``[L, N(N-1)/2]``."""
    upper = np.triu_indices(grams.shape[1], 1)
    return np.stack([_squared_distances(np.asarray(gram))[upper] for gram in grams])


def _standardised(values: np.ndarray, ranks: bool) -> np.ndarray:
    """Rows of mean 0 and length 1, whose inner products are correlations."""
    if ranks:
        from scipy.stats import rankdata

        values = rankdata(values, axis=1)
    values = values - values.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    flat = np.flatnonzero(lengths == 0).tolist()
    if flat:
        raise DegenerateError(f"layers {listed(flat)}: all samples are equally far apart; RSA is 0/0", flat)
    return values / lengths


def _nearest(grams: Any, neighbours: int) -> np.ndarray:
    """Which pairs are near, ``[L, N * N]`` float32 of 0 and 1."""
    count = grams.shape[1]
    if not 1 <= neighbours < count - 1:
        raise UserError(f"{neighbours} neighbours of {count} samples: expected 1 to {count - 2}; give more prompts")
    near = np.zeros(grams.shape, np.float32)
    for layer, gram in enumerate(grams):
        distances = _squared_distances(np.asarray(gram))
        np.fill_diagonal(distances, np.inf)
        order = np.argsort(distances, axis=1, kind="stable")[:, :neighbours]
        np.put_along_axis(near[layer], order, 1, axis=1)
    return near.reshape(len(grams), -1)
