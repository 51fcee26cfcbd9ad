"""CKA between all layers: rows of the table, beside numpy with each Gram once and, where installed, pytorch-cka.

At 300 and 1,000 samples of 32 layers of width 4,096, and at 3,000 of 30 of width 576.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rows import OURS, Row, limit, take_turns

from jaxcrit.similarity import cka

SHAPES = ((32, 300, 4096), (32, 1000, 4096), (30, 3000, 576))


def activations(layers: int, samples: int, width: int) -> np.ndarray:
    """A drifting chain with a decaying spectrum, ``[L, N, D]`` float32."""
    rng = np.random.default_rng(0)
    scale = np.arange(1, width + 1, dtype=np.float32) ** -0.3
    hidden = np.empty((layers, samples, width), np.float32)
    hidden[0] = rng.standard_normal((samples, width), np.float32) * scale
    for layer in range(1, layers):
        hidden[layer] = 0.95 * hidden[layer - 1] + 0.3 * scale * rng.standard_normal((samples, width), np.float32)
    return hidden


def gram_once(hidden: np.ndarray) -> np.ndarray:
    """Biased CKA by numpy, each Gram once, in the type of its input."""
    layers, samples, _ = hidden.shape
    flat = np.empty((layers, samples * samples), hidden.dtype)
    for layer, x in enumerate(hidden):
        centred = x - x.mean(axis=0)
        flat[layer] = (centred @ centred.T).ravel()
    products = flat @ flat.T
    norms = np.sqrt(products.diagonal())
    return np.asarray(products / norms[:, None] / norms[None, :])


def row(layers: int, samples: int, width: int) -> Row:
    """One shape."""
    hidden = activations(layers, samples, width)
    on_device = jax.device_put(hidden)
    calls: dict[str, Callable[[], Any]] = {
        OURS: lambda: cka(on_device),
        "numpy, each Gram once": lambda: gram_once(hidden),
    }
    try:
        import torch
        from cka import cka_from_features
    except ImportError:
        pass
    else:
        same = torch.from_numpy(hidden)
        calls["pytorch-cka"] = lambda: cka_from_features(same, same)
    error = float(np.abs(cka(on_device) - gram_once(hidden)).max())
    size = min(samples, 1024)
    # Half of every Gram, and half of all pairs of layers.
    products = {(size, width, size): layers * samples**2 * width, (512, 512, 512): (layers * samples) ** 2}
    name = f"CKA N={samples} D={width} L={layers}"
    return Row(name, take_turns(calls), limit(products), {"difference": error})


def rows(checkpoint: Path) -> list[Row]:
    """One row for each shape; the checkpoint is not looked at."""
    del checkpoint
    return [row(*shape) for shape in SHAPES]
