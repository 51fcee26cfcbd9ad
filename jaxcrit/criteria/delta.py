"""delta: the mean CKA between a layer and its neighbours. Low where the representation changes."""

from __future__ import annotations

from typing import Literal

import numpy as np

from jaxcrit.core.errors import UserError


def delta(
    cka: np.ndarray, window: int = 5, include_self: bool = True, *, edges: Literal["invalid", "clip"] = "invalid"
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of ``cka[r, l]`` over the layers r within ``window // 2`` of l.

    The window looks both ways, so of a jump between blocks b-1 and b both are scored low, and either may come out
    lowest; ``step`` names b itself.

    Args:
        cka: ``[..., L, L]``.
        window: odd number of layers, 3 or more; the paper's figures use 5, its notebook 3.
        include_self: whether ``cka[l, l] = 1`` counts, as in the paper. Without it 1 - delta is larger by the factor
            window / (window - 1); the order of the layers is the same.
        edges: ``invalid`` leaves out layers whose window leaves the model (NaN); ``clip``, as in the paper's code,
            takes the mean of what exists, which is not comparable with the rest.

    Returns:
        Values ``[..., L]`` float64 and valid ``[L]`` bool.

    Raises:
        UserError: the window is even, below 3 or wider than the model, or reaches where a banded sweep has no pairs.
    """
    num_layers = cka.shape[-1]
    if window % 2 == 0 or not 3 <= window <= num_layers:
        raise UserError(f"window={window}: expected an odd number from 3 to the {num_layers} layers there are")
    half = window // 2
    layers = np.arange(num_layers)
    total, counts = np.zeros(cka.shape[:-1]), np.zeros(num_layers)
    for apart in range(-half, half + 1):
        if apart or include_self:
            reached = slice(max(0, apart), num_layers + min(0, apart))
            total[..., reached] += np.diagonal(cka, offset=apart, axis1=-2, axis2=-1)
            counts[reached] += 1
    if np.isnan(total).any():
        raise UserError(
            f"window={window}: the sweep's band leaves out pairs of it; sweep with a band of at least {half}"
        )
    valid = np.full(num_layers, True) if edges == "clip" else (layers >= half) & (layers < num_layers - half)
    return np.where(valid, total / counts, np.nan), valid
