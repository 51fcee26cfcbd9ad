"""A fine-tuning run as a checkpoint directory, or as the trained tensors alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.files import as_path, atomic_path, local_path, write_text
from jaxcrit.models.adapters import WEIGHTS, place_of
from jaxcrit.models.checkpoint import DTYPES, Progress
from jaxcrit.models.decoder import Decoder
from jaxcrit.models.export import check_free, export, write_checkpoint
from jaxcrit.models.lora import peft_config, peft_tensors
from jaxcrit.models.model import Model, open_model
from jaxcrit.models.overlays import Overlay
from jaxcrit.models.shards import ADAPTER
from jaxcrit.models.weights import table, to_hf
from jaxcrit.parallel.mesh import make_mesh

DELTA = "delta.safetensors"


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What storing float32 masters in a narrower type loses.

    Attributes:
        dtype: the type.
        lost: root mean square of the rounding over that of the change since before training.
        unmoved: share of the changed weights that fall back to what they were.
    """

    dtype: str
    lost: float
    unmoved: float

    def __str__(self) -> str:
        return (
            f"rounding to {self.dtype}: error {100 * self.lost:.1f} % of the change that training made (rms);"
            f" {100 * self.unmoved:.1f} % of the changed weights fall back to what they were"
        )


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        out: the directory.
        rounding: rounding error of the masters; None where nothing was rounded.
        step: step of a run's checkpoint; else None.
    """

    out: Path
    rounding: Rounding | None
    step: int | None = None


def export_model(
    model: str,
    out: str,
    *,
    dtype: str = "source",
    delta_only: bool = False,
    adapter: bool = False,
    step: str = "",
    progress: Progress | None = None,
) -> Exported:
    """Writes a checkpoint directory that transformers loads.

    Args:
        model: checkpoint directory, hub id, adapter (it is merged), or fine-tuning run.
        out: directory to make; must not exist or be empty.
        dtype: ``source``, as each tensor has it in the checkpoint, or a float type for all.
        delta_only: write just the trained tensors of a run, as ``delta.safetensors``.
        adapter: write the adapters of a run as a directory that `peft` loads, float32 unless told otherwise.
        step: which checkpoint of a run: see `open_model`.
        progress: called with (weights done, weights in all, path); of a plain checkpoint.

    Raises:
        UserError: what cannot be read or written, or what only a run has, of what is none.
    """
    if dtype != "source" and dtype not in DTYPES:
        raise UserError(f"--dtype={dtype}: expected {listed(['source', *DTYPES])}")
    asked = "" if dtype == "source" else dtype
    is_run = (as_path(model) / "run.json").is_file()
    if not is_run and place_of(model).adapter is None:
        for flag, given in (("delta_only", delta_only), ("adapter", adapter), ("step", step)):
            if given:
                raise UserError(f"--{flag}: {model} is no finetune run, and has no such thing; give --run=RUN")
        return Exported(export(model, out, dtype=asked, progress=progress), None)
    if delta_only and adapter:
        raise UserError("--delta_only --adapter: give one of them")
    target = local_path(out, "out")
    check_free(target)
    host = make_mesh({"data": 1}, jax.devices("cpu")[:1])  # nothing is computed, so no accelerator needs room
    tuned = open_model(model, mesh=host, dtype="float32", step=step, keep=False)
    number = tuned.overlays[-1].step if is_run else None
    if adapter:
        _write_adapter(tuned, asked or "float32", target)
        return Exported(target, None, number)
    kinds = {asked} if asked else set(tuned.checkpoint.dtypes.values())
    narrow = sorted(kinds - {"float32"})
    rounding = _rounding(tuned, narrow[0]) if narrow else None
    decoder = tuned.decoder()
    if delta_only:
        _write_delta(tuned, decoder, asked, target)
    else:
        write_checkpoint(decoder, tuned.checkpoint, target, dtype=asked)
    return Exported(target, rounding, number)


def export_object(model: Model, out: str, dtype: str = "source") -> Path:
    """Writes a model in memory, overlays included, as a checkpoint directory that transformers loads.

    Args:
        model: model; its weights may be in float32 where the checkpoint's are not.
        out: directory to make; must not exist or be empty.
        dtype: ``source``, as each tensor has it in the checkpoint, or a float type for all.

    Raises:
        UserError: an unknown dtype, or a directory that cannot be written.
    """
    if dtype != "source" and dtype not in DTYPES:
        raise UserError(f"--dtype={dtype}: expected {listed(['source', *DTYPES])}")
    target = local_path(out, "out")
    check_free(target)
    write_checkpoint(model.decoder(), model.checkpoint, target, dtype="" if dtype == "source" else dtype)
    return target


def _rounding(model: Model, dtype: str) -> Rounding:
    *earlier, last = model.overlays
    before = dataclasses.replace(model, overlays=tuple(earlier)).weights()
    sums = np.zeros(4)
    for master, start in _pairs(last, before):
        rounded = master.astype(DTYPES[dtype]).astype(np.float32)
        fallen = (rounded == start.astype(DTYPES[dtype]).astype(np.float32)) & (master != start)
        errors, moves = np.square(rounded - master, dtype=np.float64), np.square(master - start, dtype=np.float64)
        sums += errors.sum(), moves.sum(), fallen.sum(), (master != start).sum()
    return Rounding(dtype, float(np.sqrt(sums[0] / max(sums[1], 1e-300))), float(sums[2] / max(sums[3], 1)))


def _pairs(tuned: Overlay, before: dict[str, jax.Array]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for path, layers, value in tuned.partition.changed(before, tuned.params):
        yield np.asarray(value), np.asarray(before[path] if layers is None else before[path][layers])


def _write_adapter(model: Model, dtype: str, out: Path) -> None:
    *below, last = model.overlays
    parts, config = last.partition, model.config
    if parts.lora is None:
        raise UserError(f"--adapter: {last.run} trained the layers themselves; export it without, or with --delta_only")
    if below:
        raise UserError(
            f"--adapter: {last.run} was trained on {below[-1].run}, a run too, and peft wants a checkpoint;"
            " export without --adapter"
        )
    if parts.outside:
        raise UserError(
            f"--adapter: {last.run} trained {', '.join(sorted(parts.outside))} too, which adapters of linear layers do"
            " not hold; export without --adapter"
        )
    tensors: dict[str, np.ndarray] = {}
    for group, entries in last.params.items():
        tensors |= peft_tensors(config, parts.lora, parts.members(group), entries)
    layers = parts.to_json()["layers"]
    settings = peft_config(config, parts.lora, layers, model.named)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(out / WEIGHTS) as temporary:
        save_file(
            {name: value.astype(DTYPES[dtype]) for name, value in tensors.items()}, temporary, metadata={"format": "pt"}
        )
    write_text(out / ADAPTER, json.dumps(settings, indent=2) + "\n")


def _write_delta(model: Model, decoder: Decoder, dtype: str, out: Path) -> None:
    layers = sorted(
        {
            layer
            for tuned in model.overlays
            for group in tuned.partition.trained
            for layer in tuned.partition.members(group)
        }
    )
    outside = {path for tuned in model.overlays for path in tuned.partition.outside}
    tensors = dict(to_hf(decoder, tuple(layers))) if layers else {}
    weights = decoder.weights()
    for row in table(model.config):
        if row.path in outside:
            tensors[row.hf] = np.asarray(weights[row.path]).reshape(row.hf_shape(model.config))
    kinds = {name: DTYPES[dtype or model.checkpoint.dtypes[name]] for name in tensors}
    held = {name: np.ascontiguousarray(value.astype(kinds[name])) for name, value in tensors.items()}
    out.mkdir(parents=True, exist_ok=True)
    notes = {"format": "pt", "base": str(model.checkpoint.path), "layers": ",".join(map(str, layers))}
    with atomic_path(out / DELTA) as temporary:
        save_file(held, temporary, metadata=notes)
