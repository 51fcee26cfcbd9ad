"""Hidden states of every layer for every sample: captured here, or by any other engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxcrit.core.errors import UserError
from jaxcrit.similarity import DegenerateError

AXES = "lnd"  # layers, samples, width


@dataclasses.dataclass(frozen=True, eq=False)
class HiddenStates:
    """What layers make of samples.

    Attributes:
        hidden: ``[L, N, D]`` float32; of layer l the residual stream after block l.
        sample_ids: ``[N]`` identity of each sample.
        units: ``[N]`` int, which prompt each sample comes from; None where each is one of its own.
        meta: what was measured on what; kept in every score.
    """

    hidden: jax.Array | np.ndarray
    sample_ids: Sequence[str]
    units: np.ndarray | None = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return int(self.hidden.shape[0])

    @property
    def num_samples(self) -> int:
        """Number of samples N."""
        return int(self.hidden.shape[1])


def states_from(
    array: Any,
    *,
    axes: str,
    sample_ids: Sequence[str] | None = None,
    units: Sequence[int] | None = None,
    model_hash: str | None = None,
) -> HiddenStates:
    """Hidden states from an array of any engine; nothing is guessed.

    Args:
        array: three-dimensional array of floats (numpy, jax, or what numpy can read).
        axes: what its axes are, in order: ``l`` layers, ``n`` samples, ``d`` width; ``lnd`` or ``nld``, say.
        sample_ids: identity of each sample, by which two runs know the samples they share; ``0``, ``1``, ... where none
            are given.
        units: which prompt each sample comes from, where several samples come from one.
        model_hash: identity of the model, where it is known.

    Raises:
        UserError: not three dimensions, axes that are not these three letters, fewer than 4 samples, identities of
            another number, NaN or infinity, or a layer in which all samples are the same.
    """
    if sorted(axes) != sorted(AXES):
        raise UserError(f"--axes={axes!r}: expected l (layers), n (samples) and d (width) in the order of the array")
    values = array if isinstance(array, jax.Array) else np.asarray(array)
    if values.ndim != 3:
        raise UserError(f"expected an array of three dimensions, layers, samples and width; got shape {values.shape}")
    if not jax.numpy.issubdtype(values.dtype, jax.numpy.floating):
        raise UserError(f"expected an array of floats, got {values.dtype}")
    hidden = values.transpose([axes.index(axis) for axis in AXES]).astype(np.float32)
    layers, samples, _ = hidden.shape
    if samples < 4:
        raise DegenerateError(f"expected at least 4 samples, got {samples} (axes={axes!r}); give more prompts")
    for layer in range(layers):
        one = np.asarray(hidden[layer])
        if not np.isfinite(one).all():
            raise DegenerateError(f"layer {layer}: NaN or infinite values; the states are damaged", [layer])
        if (one == one[0]).all():
            raise DegenerateError(f"layer {layer}: all {samples} samples are the same; nothing to compare", [layer])
    names = [str(number) for number in range(samples)] if sample_ids is None else [str(one) for one in sample_ids]
    for what, given in (("sample_ids", names), ("units", units)):
        if given is not None and len(given) != samples:
            raise UserError(f"--{what}: expected {samples} of them, one for each sample; got {len(given)}")
    meta = {} if model_hash is None else {"model_hash": model_hash}
    return HiddenStates(hidden, names, None if units is None else np.asarray(units), meta)
