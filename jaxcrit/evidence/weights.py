"""Weights streamed from the checkpoint, a layer at a time, for every criterion that looks at weights alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcrit.core import processes
from jaxcrit.core.errors import UserError
from jaxcrit.evidence.criterion import Measured
from jaxcrit.models.gains import fold
from jaxcrit.models.model import Model
from jaxcrit.models.partition import FROZEN
from jaxcrit.models.weights import offsets, sizes, table

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Spectra:
    """Singular values of weight matrices; of the weights alone.

    Attributes:
        shapes: by name of the matrix within its layer.
        values: ``[L, min(shape)]`` float32, descending, by the same names; ``[L, E, min(shape)]`` of a mixture's
            experts.
    """

    shapes: Mapping[str, tuple[int, int]]
    values: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class WeightChanges:
    """Of a tuned model's blocks from its base's.

    Attributes:
        apart: ``[L]`` float64, norm of the difference over all tensors of the layer.
        base: ``[L]`` float64, norm of the base's.
        experts: ``[2, L, E]`` float64, both norms of each expert of a mixture; None of another model.
    """

    apart: np.ndarray
    base: np.ndarray
    experts: np.ndarray | None = None


def layer_tensors(model: Model) -> Iterator[dict[str, np.ndarray]]:
    """Every layer's tensors by weight-table path, float32, as in the file; experts stacked; no model is built.

    Of a fine-tuning run, what it trained stands in place of the checkpoint's.

    Raises:
        UserError: a tensor holds NaN or infinity.
    """
    config, begin = model.config, offsets(model.config)
    rows = [row for row in table(config) if row.stacked]
    for layer in range(config.num_layers):
        tensors = {}
        for row in rows:
            part = slice(begin[row.path], begin[row.path] + row.hf_shape(config)[0])
            read: list[np.ndarray] = []
            for name, place in row.places(config, layer):
                read.append(model.checkpoint.read(name, part, None, place).astype(np.float32))
                if not np.isfinite(read[-1]).all():
                    raise UserError(f"{model.checkpoint.path}: NaN or infinite values in {name}; weights are damaged")
            tensors[row.path] = np.stack(read) if row.of_experts else read[0]
        for tuned in model.overlays:
            group, lora = tuned.partition.groups[layer], tuned.partition.lora
            slot = tuned.partition.members(group).index(layer)
            own = tuned.params[group].items() if group != FROZEN else ()
            mine = {path: value[slot : slot + 1] for path, value in own if _inside(path)}
            for path, value in mine.items() if lora is None or not mine else lora.changes(config, mine):
                found = np.asarray(processes.whole(value), np.float32).reshape(tensors[path].shape)
                tensors[path] = found if lora is None else tensors[path] + found
            tensors |= {path: np.asarray(value) for path, value in fold(config, tensors, tuned.gains, layer).items()}
        yield tensors


def _inside(path: str) -> bool:
    """Whether a weight is of the blocks."""
    return path.startswith("blocks.")


def weight_spectra(model: Model, progress: Progress | None = None) -> Spectra:
    """Singular values of every matrix, decomposed in float32; one layer's weights are held at a time."""
    shapes: dict[str, tuple[int, int]] = {}
    values: dict[str, list[np.ndarray]] = {}
    for layer, tensors in enumerate(layer_tensors(model)):
        for path, matrix in tensors.items():
            if matrix.ndim > 1:
                shapes[path] = (matrix.shape[-2], matrix.shape[-1])
                values.setdefault(path, []).append(np.linalg.svd(matrix, compute_uv=False))
        if progress is not None:
            progress(layer + 1, model.config.num_layers)
    return Spectra(shapes, {path: np.stack(found) for path, found in values.items()})


def weight_changes(base: Model, tuned: Model, progress: Progress | None = None) -> WeightChanges:
    """How far the tuned model's blocks are from the base's; one layer of each is held at a time.

    Raises:
        UserError: the two are of different shapes.
    """
    if sizes(base.config) != sizes(tuned.config):
        differ = [name for name, size in sizes(base.config).items() if size != sizes(tuned.config)[name]]
        raise UserError(
            f"--base and --model: expected models of one shape, but they differ in {', '.join(differ)}"
            f" ({', '.join(f'{sizes(base.config)[n]} and {sizes(tuned.config)[n]}' for n in differ)})"
        )
    norms, of_each = [], []
    for layer, (before, after) in enumerate(zip(layer_tensors(base), layer_tensors(tuned), strict=True)):
        if before.keys() != after.keys():
            raise UserError(
                f"--base and --model: expected the same tensors, layer {layer} differs in"
                f" {', '.join(sorted(before.keys() ^ after.keys()))}"
            )
        changes = {path: after[path].astype(np.float64) - value for path, value in before.items()}
        norms.append((_norm(changes.values()), _norm(value.astype(np.float64) for value in before.values())))
        each = [path for path, value in before.items() if value.ndim == 3]
        of_each.append([_norms([found[path] for path in each]) for found in (changes, before)])
        if progress is not None:
            progress(layer + 1, base.config.num_layers)
    experts = np.moveaxis(np.array(of_each), 0, 1) if base.config.experts else None
    apart, of_base = np.array(norms).T
    return WeightChanges(apart, of_base, experts)


def _norm(arrays: Iterable[np.ndarray]) -> float:
    return float(np.sqrt(sum(np.vdot(array, array) for array in arrays)))


def _norms(arrays: Sequence[np.ndarray]) -> Any:
    """``[E]``, of each expert over all of its matrices; of no arrays 0."""
    return np.sqrt(sum(np.sum(np.square(array.astype(np.float64)), axis=(1, 2)) for array in arrays))


def relative_mean(spectra: Spectra, of: Callable[[np.ndarray, tuple[int, int]], np.ndarray]) -> Measured:
    """A layer's figure from its matrices': each relative to the mean of its kind over the layers, then their mean.

    Kinds (q, o, down, ...) differ in shape and so in level; Spectrum too compares within a kind. 1 is a layer like the
    average. The experts of a layer are of one kind, and count as their mean; the figure of each expert, likewise the
    mean of its matrices, is kept beside as ``experts``.

    Args:
        spectra: spectra of all matrices.
        of: function of singular values ``[..., r]`` (float64) and shape, giving ``[...]``.
    """
    kinds = [of(values.astype(np.float64), spectra.shapes[name]) for name, values in spectra.values.items()]
    levels = [np.mean(values, where=np.isfinite(values)) if np.isfinite(values).any() else np.nan for values in kinds]
    found = [values / level for values, level in zip(kinds, levels, strict=True)]
    each = [values for values in found if values.ndim == 2]
    meta = {"experts": np.mean(each, axis=0).tolist()} if each else {}
    return Measured(
        np.mean([values if values.ndim == 1 else values.mean(axis=1) for values in found], axis=0), meta=meta
    )
