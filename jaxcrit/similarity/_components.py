"""Principal components of activations as directions in the space of features, to be removed, added or read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcrit.core.errors import UserError, listed
from jaxcrit.similarity._grams import centred_grams
from jaxcrit.similarity._spectrum import Spectrum, decompose, directions


@dataclasses.dataclass(frozen=True, eq=False)
class Components:
    """The first k principal components of every layer.

    Attributes:
        mean: ``[L, D]`` float32 mean of the samples.
        directions: ``[L, k, D]`` float32, unit right singular vectors V of the centred activations.
        coordinates: ``[L, N, k]`` float32, ``U S``: where each sample lies along them.
        spectrum: all singular values.
    """

    mean: np.ndarray
    directions: np.ndarray
    coordinates: np.ndarray
    spectrum: Spectrum

    def part(self, components: Sequence[int]) -> np.ndarray:
        """What each sample has of these components: ``[L, N, D]``, ``sum_c z_c v_c``."""
        chosen = list(components)
        return np.einsum("lnk,lkd->lnd", self.coordinates[:, :, chosen], self.directions[:, chosen])

    def unidentified(self, components: Sequence[int], layers: Sequence[int]) -> list[str]:
        """Warnings where a set of components is an accident of these samples.

        What a set spans is determined where the eigenvalues in it are apart from those outside by more than their
        sampling error (`Spectrum.sampling_gap`); how its members lie among themselves does not matter.
        """
        chosen, spectrum = set(components), self.spectrum
        edges = sorted(i for i in {*chosen, *(c - 1 for c in chosen)} if i >= 0 and (i in chosen) != (i + 1 in chosen))
        return [
            f"layer {layer}: components {edge} and {edge + 1} are not told apart by {spectrum.num_samples} samples"
            f" (relative gap of their variances {spectrum.gaps[layer, edge]:.3f}, sampling error"
            f" {spectrum.sampling_gap:.3f}); another draw of prompts may find others"
            for layer in layers
            for edge in edges
            if edge < spectrum.gaps.shape[1] and spectrum.gaps[layer, edge] < spectrum.sampling_gap
        ]


def principal_components(hidden: Any, k: int) -> Components:
    """Decomposes the activations of every layer.

    Args:
        hidden: ``[L, N, D]`` activations of any float type.
        k: how many components.

    Raises:
        UserError: more components than the samples or the width allow, one beyond the rank of a layer, or
            degenerate activations (see `centred_grams`).
    """
    hidden = np.asarray(hidden, np.float32)
    most = min(hidden.shape[1] - 1, hidden.shape[2])
    if k > most:
        raise UserError(
            f"component {k - 1} of {hidden.shape[1]} samples, width {hidden.shape[2]}: expected at most component"
            f" {most - 1} (counted from 0); name earlier components"
        )
    spectrum = decompose(centred_grams(hidden), k)
    if short := np.flatnonzero(spectrum.rank < k).tolist():
        raise UserError(
            f"layers {listed(short)}: component {k - 1} is beyond the rank, {spectrum.rank.min()} in layer"
            f" {spectrum.rank.argmin()}; name earlier components (counted from 0)"
        )
    values = spectrum.singular_values[:, :k]
    found = directions(hidden, spectrum.scores, values)
    return Components(hidden.mean(axis=1), found, (spectrum.scores * values[:, None]).astype(np.float32), spectrum)
