"""``jaxcrit export``: a model or a fine-tuning run in, a checkpoint directory that transformers loads out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxcrit.commands import shared
from jaxcrit.core import console
from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.groups import BY_HASH, WHERE
from jaxcrit.core.options import Options, option

if TYPE_CHECKING:
    from jaxcrit.models.checkpoint import Progress
    from jaxcrit.models.decoder import Decoder
    from jaxcrit.models.model import Model

DELTA = "delta.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions(Options, title="what"):
    """What ``jaxcrit export`` is asked."""

    model: str = option("", "checkpoint directory or hub id", word="DIR", free=BY_HASH)
    run: str = option("", "instead: run of jaxcrit finetune", word="DIR", free=BY_HASH)
    out: str = option("", "directory to write; must not exist yet or be empty", word="DIR", free=WHERE)
    dtype: str = option("source", "dtype of the weights; source: as read", ("float32", "bfloat16", "float16"))
    step: str = option("", "of a run: checkpoint N, best or last (default: where it ended)", word="N|best|last")
    delta_only: bool = option(False, "of a run: just the trained tensors, as delta.safetensors")
    adapter: bool = option(False, "of a run with --lora_rank: the adapters, for peft")


OPTIONS = ExportOptions


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
    rounding: Rounding | None = None
    step: int | None = None


def run(options: ExportOptions) -> int:
    """Loads and writes; says what rounding cost."""
    if bool(options.model) == bool(options.run):
        raise UserError("export: expected --model=DIR or --run=DIR, one of them")
    if not options.out:
        raise UserError("export: expected --out=DIR")
    from jaxcrit.core.progress import bar, bars, moved

    given = {name: getattr(options, name) for name in ("dtype", "delta_only", "adapter", "step")}
    with bar(bars, total=1, desc="weights", unit=" tensors") as shown:
        try:
            exported = export_model(options.model or options.run, options.out, **given, progress=moved(shown))
        except UserError as error:  # which names the flag of all other commands
            raise UserError(str(error).replace(f"--model={options.run}:", f"--run={options.run}:")) from None
    if exported.step is not None:
        console.tell(f"{options.run or options.model}: checkpoint of step {exported.step}, written as {options.out}:")
    if exported.rounding is not None:
        console.tell(str(exported.rounding))
    console.tell(str(exported.out))
    if not options.delta_only and not options.adapter:
        shared.tell_next("export", options, exported.out)
    return 0


@shared.public
def export(model: str | Path | Model, out: str | Path, *, dtype: str = "source") -> Path:
    """Writes a checkpoint directory that transformers loads.

    Args:
        model: a `Model`, tuned ones among them, or the name of one.
        out: directory to make; it must not exist yet or be empty.
        dtype: dtype of the weights; ``source``, as the checkpoint has it.

    Returns:
        The directory.

    Raises:
        UserError: the model cannot be read, or the directory not be written.
    """
    return export_model(model, str(out), dtype=dtype).out


def export_model(
    model: str | Path | Model,
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
        model: checkpoint directory, hub id, adapter (it is merged), or fine-tuning run; or a model in memory, overlays
            included, whose weights may be in float32 where the checkpoint's are not.
        out: directory to make; must not exist or be empty.
        dtype: ``source``, as each tensor has it in the checkpoint, or a float type for all.
        delta_only: write just the trained tensors of a run, as ``delta.safetensors``.
        adapter: write the adapters of a run as a directory that `peft` loads, float32 unless told otherwise.
        step: which checkpoint of a run: see `open_model`.
        progress: called with (weights done, weights in all, path); of a plain checkpoint.

    Raises:
        UserError: what cannot be read or written, or what only a run has, of what is none.
    """
    import jax

    from jaxcrit.core.files import as_path, local_path, write_text
    from jaxcrit.models import export as writing
    from jaxcrit.models.adapters import place_of
    from jaxcrit.models.checkpoint import DTYPES
    from jaxcrit.models.model import Model, open_model
    from jaxcrit.parallel.mesh import make_mesh
    from jaxcrit.reporting.card import CARD, card

    if dtype != "source" and dtype not in DTYPES:
        raise UserError(f"--dtype={dtype}: expected {listed(['source', *DTYPES])}")
    asked = "" if dtype == "source" else dtype
    if isinstance(model, Model):
        target = local_path(out, "out")
        writing.check_free(target)
        beside = {CARD: card(target.name, model.named, [one.run for one in model.overlays])}
        return Exported(writing.write_checkpoint(model.decoder(), model.checkpoint, target, dtype=asked, beside=beside))
    model = str(model)
    is_run = (as_path(model) / "run.json").is_file()
    if not is_run and place_of(model).adapter is None:
        for flag, given in (("delta_only", delta_only), ("adapter", adapter), ("step", step)):
            if given:
                raise UserError(f"--{flag}: {model} is no finetune run, and has no such thing; give --run=RUN")
        beside = {CARD: card(local_path(out, "out").name, model, [])}
        return Exported(writing.export(model, out, dtype=asked, progress=progress, beside=beside))
    if delta_only and adapter:
        raise UserError("--delta_only --adapter: give one of them")
    target = local_path(out, "out")
    writing.check_free(target)
    host = make_mesh({"data": 1}, jax.devices("cpu")[:1])  # nothing is computed, so no accelerator needs room
    tuned = open_model(model, mesh=host, dtype="float32", step=step, keep=False)
    number = tuned.overlays[-1].step if is_run else None
    told = card(target.name, tuned.named, [one.run for one in tuned.overlays], adapter=adapter)
    if adapter:
        _write_adapter(tuned, asked or "float32", target)
        write_text(target / CARD, told)
        return Exported(target, None, number)
    kinds = {asked} if asked else set(tuned.checkpoint.dtypes.values())
    narrow = sorted(kinds - {"float32"})
    rounding = _rounding(tuned, narrow[0]) if narrow else None
    decoder = tuned.decoder()
    if delta_only:
        _write_delta(tuned, decoder, asked, target)
        write_text(target / CARD, told)
    else:
        writing.write_checkpoint(decoder, tuned.checkpoint, target, dtype=asked, beside={CARD: told})
    return Exported(target, rounding, number)


def _rounding(model: Model, dtype: str) -> Rounding:
    from jaxcrit.models.checkpoint import DTYPES

    *earlier, last = model.overlays
    before = dataclasses.replace(model, overlays=tuple(earlier)).weights()
    sums = np.zeros(4)
    for path, layers, value in last.partition.changed(before, last.params):
        master, start = np.asarray(value), np.asarray(before[path] if layers is None else before[path][layers])
        rounded = master.astype(DTYPES[dtype]).astype(np.float32)
        fallen = (rounded == start.astype(DTYPES[dtype]).astype(np.float32)) & (master != start)
        errors, moves = np.square(rounded - master, dtype=np.float64), np.square(master - start, dtype=np.float64)
        sums += errors.sum(), moves.sum(), fallen.sum(), (master != start).sum()
    return Rounding(dtype, float(np.sqrt(sums[0] / max(sums[1], 1e-300))), float(sums[2] / max(sums[3], 1)))


def _write_adapter(model: Model, dtype: str, out: Path) -> None:
    from jaxcrit.core.files import write_text
    from jaxcrit.models.adapters import WEIGHTS
    from jaxcrit.models.checkpoint import DTYPES
    from jaxcrit.models.lora import peft_config, peft_tensors
    from jaxcrit.models.shards import ADAPTER

    *below, last = model.overlays
    parts, config = last.partition, model.config
    if last.gains:
        raise UserError(
            f"--adapter: {last.run} has gains folded into layers that its adapters are not of; export without --adapter"
        )
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
    _save({name: value.astype(DTYPES[dtype]) for name, value in tensors.items()}, out / WEIGHTS)
    write_text(out / ADAPTER, json.dumps(settings, indent=2) + "\n")


def _write_delta(model: Model, decoder: Decoder, dtype: str, out: Path) -> None:
    from jaxcrit.models.checkpoint import DTYPES
    from jaxcrit.models.weights import table, to_hf

    parts = [tuned.partition for tuned in model.overlays]
    layers = sorted({layer for one in model.overlays for layer in one.layers})
    outside = {path for one in parts for path in one.outside}
    tensors = dict(to_hf(decoder, tuple(layers))) if layers else {}
    weights = decoder.weights()
    for row in table(model.config):
        if row.path in outside:
            tensors[row.hf] = np.asarray(weights[row.path])
    kinds = {name: DTYPES[dtype or model.checkpoint.dtypes[name]] for name in tensors}
    held = {name: np.ascontiguousarray(value.astype(kinds[name])) for name, value in tensors.items()}
    notes = {"base": str(model.checkpoint.path), "layers": ",".join(map(str, layers))}
    _save(held, out / DELTA, notes)


def _save(tensors: dict[str, np.ndarray], file: Path, notes: dict[str, str] | None = None) -> None:
    from safetensors.numpy import save_file

    from jaxcrit.core.files import atomic_path

    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **(notes or {})})
