"""What every command does first: the mesh, the model on it, its tokenizer and its identity."""

from __future__ import annotations

import contextvars
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jax
import numpy as np
from jax.sharding import Mesh

from jaxcrit import __version__
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import DAMAGED, as_path
from jaxcrit.core.groups import RowOptions
from jaxcrit.core.hashing import sha256_json
from jaxcrit.core.layers import ChosenLayers
from jaxcrit.core.rundir import read_record
from jaxcrit.core.schema import Count, conform
from jaxcrit.data.batches import Budget
from jaxcrit.data.dataset import Dataset, Limits, read_datasets
from jaxcrit.data.templates import describe_template
from jaxcrit.data.tokenizer import load_tokenizer
from jaxcrit.models.adapters import place_of, read_adapter
from jaxcrit.models.attention import ASKED, Attention, choose_attention, platform_of
from jaxcrit.models.checkpoint import DTYPES, Checkpoint, load, model_hash, open_checkpoint
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Decoder
from jaxcrit.models.gains import fold
from jaxcrit.models.overlays import Overlay, read_overlay
from jaxcrit.models.partition import TRAIN, TrainedRecord, partition
from jaxcrit.models.weights import hf_shapes, table
from jaxcrit.parallel.mesh import batch_rows, default_axes, device_memory, make_mesh, parse_mesh, row_parts

# Of ModelConfig: says nothing about what the blocks compute.
_FREE = ("family", "attention", "fused_experts", "max_length", "bos_token_id", "eos_token_ids", "hf_json", "ignored")
# By platform: operations in the time of a compile (programs are kept, so that it is often but a read), operations in
# the time that it takes to start a pass, tokens in the time that it takes to read the weights. Orders of magnitude.
_COSTS = {"cpu": (3e10, 3e8, 32), "other": (3e14, 3e11, 128)}
_TRAINED_BYTES = 16  # of a weight that trains: itself, its gradient and AdamW's two moments, in float32
_DECODING = 16  # compiles of a pass that decoding takes as long as
EMBEDDED_MODEL = Path(__file__).parents[1] / "assets" / "demo_model"
_OPENING: contextvars.ContextVar[tuple[Path, ...]] = contextvars.ContextVar("opening", default=())  # runs, from the top
Bars = Callable[..., Any]  # makes a progress bar: called as tqdm with total= and desc=


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A checkpoint with its overlays on a mesh: headers checked, identity known; weights are read when they are needed.

    Attributes:
        checkpoint: directory, config and tensor headers.
        tokenizer: the model's own (transformers).
        model_hash: identity of config and weights, overlays included.
        mesh: devices.
        dtype: dtype of weights and compute; empty for that of the file.
        overlays: fine-tuning runs, adapters and edits on top of the checkpoint, in order.
        named: what the checkpoint was called: its hub id, or its directory.
        embedded: whether it is the model that comes with the package.
        keep: whether weights read for `weights` and `trainable` are kept too. False for a command that opened the model
            for itself and takes its weights apart, so that no weight is in memory twice.
    """

    checkpoint: Checkpoint
    tokenizer: Any
    model_hash: str
    mesh: Mesh
    dtype: str
    overlays: tuple[Overlay, ...] = ()
    named: str = ""
    embedded: bool = False
    keep: bool = True
    # Weights of the checkpoint by dtype, shared with every model made of this one; and this model's own.
    _held: dict[str, Decoder] = dataclasses.field(default_factory=dict, repr=False)
    _own: list[Decoder] = dataclasses.field(default_factory=list, init=False, repr=False)

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.checkpoint.config

    @property
    def natural_dtype(self) -> str:
        """Dtype of the file's weights; float32, as which they are read, where it has several."""
        stored = set(self.checkpoint.dtypes.values())
        return stored.pop() if len(stored) == 1 else "float32"

    @property
    def short_name(self) -> str:
        """Name for a directory: the last overlay's run, else the checkpoint's directory, else ``embedded``."""
        if self.overlays and self.overlays[-1].run is not None:
            return self.overlays[-1].run.name
        return "embedded" if self.embedded else self.checkpoint.path.resolve().name.removesuffix(".gguf")

    def describe(self) -> dict[str, Any]:
        """JSON values for ``run.json``: which model, of what shape, in which dtype."""
        runs = [str(overlay.run) for overlay in self.overlays if overlay.run is not None]
        return {
            "path": runs[-1] if runs else "embedded" if self.embedded else self.named,
            "hash": self.model_hash,
            "family": self.config.family,
            "num_layers": self.config.num_layers,
            "width": self.config.width,
            "dtype": self.dtype,
            "ignored_keys": list(self.config.ignored),
            "notes": list(self.checkpoint.notes),
            **self._told(),
        }

    @property
    def determines(self) -> dict[str, Any]:
        """JSON values on which the bits of whatever is computed with this model depend, for what is kept of it."""
        versions = {"jaxcrit": __version__, "jax": jax.__version__, "platform": platform_of(self.mesh.devices.flat[0])}
        return {"model": self.model_hash, "dtype": self.dtype, "mesh": dict(self.mesh.shape), **versions}

    @property
    def partly_trained(self) -> bool:
        """Whether some layers were trained, and not all."""
        return 0 < len(self.trained.get("layers", ())) < self.config.num_layers

    @property
    def facts(self) -> dict[str, Any]:
        """JSON values for the meta of scores: which model, and what was trained in it where not every layer was."""
        return {"model_type": self.config.family, "model_hash": self.model_hash, **self._told()}

    def _told(self) -> dict[str, Any]:
        """What whoever reads a number of this model must know."""
        stored = self.checkpoint.stored
        return {
            **({"dequantised_from": stored} if stored else {}),
            **({"trained": self.trained} if self.partly_trained else {}),
        }

    @property
    def trained(self) -> dict[str, Any]:
        """JSON values of what was trained: layers, and what they were chosen by; empty for a checkpoint."""
        trainings = [overlay for overlay in self.overlays if overlay.run is not None or overlay.chosen is not None]
        if not trainings:
            return {}
        chosen = [overlay.chosen for overlay in trainings if overlay.chosen is not None]
        return {
            "layers": sorted({layer for overlay in trainings for layer in overlay.partition.layers}),
            "criteria": sorted({one.criterion for one in chosen}),
            "rules": [one.rule for one in chosen],
        }

    def machine(self) -> dict[str, Any]:
        """JSON values for ``run.json``: devices, mesh, form of attention."""
        device = jax.devices()[0]
        devices = {"kind": device.device_kind, "platform": device.platform, "mesh": dict(self.mesh.shape)}
        return {"devices": devices, "attention": self.attention()}

    def settled(self, options: Any) -> dict[str, Any]:
        """What options come to with this model: how it renders rows, the dtype of its weights and compute."""
        return {"template": describe_template(self.tokenizer, options), "dtype": self.dtype}

    def attention(self, dtype: str = "") -> str:
        """The form that attention takes for the longest rows, in this dtype of compute; default the model's."""
        stored = list(self.checkpoint.dtypes.values())
        return _form(self.config, dtype or self.dtype or max(stored, key=stored.count))

    def read(self, options: RowOptions, rows: Any = None, **how: Any) -> list[Dataset]:
        """Rows as this model is given them; arguments and errors as of `read_datasets`."""
        limits = Limits(self.config.max_length, self.config.vocab_size, str(self.checkpoint.path))
        return read_datasets(rows, self.tokenizer, options, limits, **how)

    def budget(self, batch_size: int, *, passes: float = 1, new_tokens: int = 0) -> Budget:
        """What batches of this model may be and what they cost.

        Args:
            batch_size: rows of a batch, at most; rounded up to what divides over the mesh.
            passes: how often the blocks run on each batch.
            new_tokens: tokens that are generated for each row.
        """
        parts, stored = row_parts(self.mesh), [row for row in table(self.config) if row.stacked]
        operations = 2 * sum(math.prod(row.shape(self.config)) for row in stored)  # of a token
        compiles, starts, reads = _COSTS["cpu" if self.mesh.devices.flat[0].platform == "cpu" else "other"]
        steps = passes * (1 + new_tokens)
        return Budget(
            rows=batch_rows(batch_size, self.mesh),
            least=parts,
            shape=parts * compiles * (_DECODING if new_tokens else 1) / operations / passes,
            batch=parts * (reads + starts / operations) * steps / passes,
            row=new_tokens,
        )

    def decoder(self, bars: Bars | None = None) -> Decoder:
        """The model with its weights on the mesh: read at the first call, kept for the next ones."""
        if not self._own:
            self._own.append(self._merged(bars, keep=not self.overlays))
        return self._own[0]

    def weights(self, bars: Bars | None = None) -> dict[str, jax.Array]:
        """Weights with overlays by weight-table path, for a caller that takes them apart.

        Arrays that the model holds are among them, so they must not be donated. What it does not hold is read and,
        unless the model is to ``keep`` it, the caller's alone.
        """
        return (self._own[0] if self._own else self._merged(bars, keep=self.keep)).weights()

    def trainable(self, bars: Bars | None = None) -> dict[str, jax.Array]:
        """Weights with overlays by weight-table path, as exact as they are known, for a training to part.

        Arrays that the model holds are among them: a training that donates must donate copies. The values do not depend
        on what was asked of the model before.
        """
        natural, mine = self.natural_dtype, self.dtype or self.natural_dtype
        exact = mine == "float32" or (mine == natural and not self.overlays)
        if exact and (self.keep or self._own or self.dtype in self._held):
            return self.weights(bars)
        return dataclasses.replace(self, dtype="float32" if self.overlays else "", keep=False).weights(bars)

    def apart(self) -> Model:
        """The model for a step that must leave no weights in memory: itself if it is to keep them, else a twin."""
        return self if self.keep else dataclasses.replace(self, _held={})

    def with_overlay(self, overlay: Overlay) -> Model:
        """This model with an overlay on top; both share the checkpoint's weights, which stay as they are."""
        identity = sha256_json({"base": self.model_hash, **overlay.identity()})
        return dataclasses.replace(self, model_hash=identity, overlays=(*self.overlays, overlay))

    def with_layers_of(self, other: Model, layers: Sequence[int]) -> Model:
        """This model with some layers taken from another.

        Args:
            other: model of the same shape, arithmetic and vocabulary.
            layers: 0-based layers.

        Raises:
            UserError: see `check_pair`; or a layer is outside the model.
        """
        check_pair(self, other)
        if not layers:
            return self
        parts = partition(self.config, layers)
        chosen = np.asarray(parts.members(TRAIN), np.int32)
        taken = {
            path: value[chosen].astype(np.float32)
            for path, value in other.decoder().weights().items()
            if path.startswith("blocks.")
        }
        return self.with_overlay(Overlay(parts, {TRAIN: taken}, None, 0))

    def _merged(self, bars: Bars | None, *, keep: bool) -> Decoder:
        """The checkpoint's weights, read unless they are held, with the overlays in their places.

        What nobody holds is given away for it.
        """
        below = self._held.get(self.dtype) or self._read(bars)
        if keep:
            self._held[self.dtype] = below
        weights = below.weights()
        del below
        shared = self._held[self.dtype].weights() if self.dtype in self._held else {}
        for overlay in self.overlays:
            # What an overlay below has changed is a copy already; all else is still the array that others hold.
            held = [path for path, value in weights.items() if value is shared.get(path)]
            weights = fold(self.config, overlay.partition.merge(weights, overlay.params, held=held), overlay.gains)
        return Decoder(self.config, weights)

    def _read(self, bars: Bars | None) -> Decoder:
        if bars is None:
            return load(self.checkpoint, dtype=self.dtype, mesh=self.mesh)
        with bars(total=1, desc="weights", unit=" tensors") as bar:

            def progress(done: int, total: int, _: str) -> None:
                bar.total = total
                bar.update(done - bar.n)

            return load(self.checkpoint, dtype=self.dtype, mesh=self.mesh, progress=progress)


def open_model(
    model: str | Path | Model = "",
    *,
    mesh: str | Mesh = "",
    dtype: str = "",
    step: str = "",
    bars: Bars | None = None,
    keep: bool = True,
    named: str = "",
    trains: bool = False,
) -> Model:
    """Opens a checkpoint directory, GGUF file, hub id, adapter or fine-tuning run; for an empty name the embedded one.

    Args:
        model: name of one of these; or a model that is open already, which is returned as it is. An adapter of PEFT
            finds its base as `place_of` says.
        mesh: such as ``data=4,fsdp=2``, or made already; default as of `default_axes`.
        dtype: default float32 on CPU, where bfloat16 is slower, and the file's own elsewhere.
        step: which checkpoint of a run: a number, ``best``, ``last``; default where training ended.
        bars: makes progress bars.
        keep: whether weights once read are kept, see `Model`.
        named: what named the model, for messages, such as ``--base=MODEL``; default ``--model=MODEL``.
        trains: whether all of it may be trained, which the default mesh makes room for.

    Raises:
        UserError: see `open_checkpoint`, `place_of`, `read_adapter`, `load_tokenizer`, `make_mesh`, `choose_attention`;
            or a run that is no fine-tuning, has no such checkpoint, or whose model is gone or has changed.
    """
    if isinstance(model, Model):
        return model
    model = str(model)
    if model and (as_path(model) / "run.json").is_file():
        return _open_run(as_path(model), mesh, dtype, step, bars, keep, trains)
    asked = {} if isinstance(mesh, Mesh) else parse_mesh(mesh)
    place = place_of(model or str(EMBEDDED_MODEL), named)
    if step:
        raise UserError(f"--step={step}: {model or 'the embedded model'} is no finetune run, and has no steps")
    try:
        checkpoint = dataclasses.replace(open_checkpoint(place.checkpoint), tokenizer=place.tokenizer)
    except UserError as error:
        if place.adapter in (None, place.checkpoint):
            raise
        raise UserError(f"{error}; it is the base of {place.adapter}: ADAPTER@BASE names another") from None
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "")
    devices = mesh if isinstance(mesh, Mesh) else make_mesh(asked or _default_mesh(checkpoint, dtype, trains))
    how = Attention(ASKED.get(), platform_of(devices.devices.flat[0]), devices)
    checkpoint = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, attention=how))
    _form(checkpoint.config, "bfloat16")  # which every form knows: what else keeps it from this model is said first
    tokenizer = load_tokenizer(place.tokenizer)
    named = str(place.checkpoint.resolve()) if place.adapter else place.named
    identity = model_hash(checkpoint)
    found = Model(checkpoint, tokenizer, identity, devices, dtype, named=named, embedded=not model, keep=keep)
    if place.adapter is None:
        return found
    return found.with_overlay(read_adapter(place, checkpoint.config, devices))


def _default_mesh(checkpoint: Checkpoint, dtype: str, trains: bool) -> dict[str, int]:
    """The mesh where none is asked for, by the size of the weights (and what trains them) and of a device's memory."""
    kinds = {dtype} if dtype else set(checkpoint.dtypes.values())
    width = _TRAINED_BYTES if trains else max(np.dtype(DTYPES[kind]).itemsize for kind in kinds)
    weights = width * sum(math.prod(shape) for shape in hf_shapes(checkpoint.config).values())
    return default_axes(weights, checkpoint.config.width, jax.device_count(), device_memory(jax.local_devices()))


def _form(config: ModelConfig, dtype: str) -> str:
    how = config.attention
    rows = 1 if how.mesh is None else how.mesh.size
    shape = rows, config.max_length, config.num_heads, config.head_dim
    return choose_attention(how, DTYPES[dtype], *shape, capped=config.attention_cap is not None)[0]


class BaseModel(TypedDict):
    """The model that was tuned, in ``run.json``."""

    path: str
    hash: str


class Ended(TypedDict, total=False):
    """What ``result`` of ``run.json`` says of the model that came out."""

    model_step: Count


class TunedRequired(TypedDict):
    """``run.json`` of a run of ``finetune`` that has begun to train."""

    model: BaseModel
    trained: TrainedRecord
    layers: ChosenLayers


class TunedRun(TunedRequired, total=False):
    """With what it has at its end."""

    result: Ended


def _open_run(run: Path, mesh: str | Mesh, dtype: str, step: str, bars: Bars | None, keep: bool, trains: bool) -> Model:
    record = read_record(run)
    if record.get("command") not in ("finetune", "edit"):
        raise UserError(f"{run}: is a run of jaxcrit {record.get('command')}; expected a checkpoint or a finetune run")
    if missing := [key for key in ("model", "trained", "layers") if key not in record]:
        raise UserError(f"{run}: has no {missing[0]} in run.json yet; let jaxcrit {record['command']} run on")
    conform(record, TunedRun, str(run / "run.json"), DAMAGED)
    base = record["model"]
    step = step or str(record.get("result", {}).get("model_step", "last"))
    path = "" if base["path"] == "embedded" else base["path"]
    if run.resolve() in _OPENING.get():
        raise UserError(f"{run / 'run.json'}: names a model that is tuned from itself; {DAMAGED}")
    inside = _OPENING.set((*_OPENING.get(), run.resolve()))
    try:
        told = f"{run}: trained on {path}"
        below = open_model(path, mesh=mesh, dtype=dtype, bars=bars, keep=keep, named=told, trains=trains)
    finally:
        _OPENING.reset(inside)
    if below.model_hash != base["hash"]:
        raise UserError(
            f"{run}: was trained on {path or 'the embedded model'} with hash {base['hash'][:12]}, which now has"
            f" {below.model_hash[:12]}; put the original back"
        )
    return below.with_overlay(read_overlay(run, below.config, below.mesh, record, step))


def changed_layers(base: Model, tuned: Model) -> tuple[int, ...]:
    """Layers in which two models of one shape differ: what their overlays train, and what differs in their files.

    Weights are compared by their digests, so layers of another dtype differ too.
    """
    below = 0  # overlays that both have
    for one, other in zip(base.overlays, tuned.overlays, strict=False):
        if one is not other and (one.run is None or (one.run, one.step) != (other.run, other.step)):
            break
        below += 1
    own = (*base.overlays[below:], *tuned.overlays[below:])
    changed = {layer for overlay in own for layer in overlay.layers}
    if base.checkpoint.path != tuned.checkpoint.path:
        ours, theirs = base.checkpoint.digests(), tuned.checkpoint.digests()
        rows = [row for row in table(base.config) if row.stacked]
        changed |= {
            layer
            for layer in range(base.config.num_layers)
            for row in rows
            if [ours[name] for name in row.names(base.config, layer)]
            != [theirs[name] for name in row.names(tuned.config, layer)]
        }
    return tuple(sorted(changed))


def check_pair(base: Model, tuned: Model, roles: tuple[str, str] = ("base", "tuned")) -> None:
    """Checks that one model can be tuned from the other.

    Args:
        base: one model.
        tuned: the other.
        roles: options that name the two.

    Raises:
        UserError: their shapes, their arithmetic, their vocabularies or their devices differ.
    """
    one, other = (f"{role} model" if role == "tuned" else role for role in roles)
    names = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in _FREE]
    differ = [
        f"{name} {getattr(base.config, name)} in the {one}, {getattr(tuned.config, name)} in the {other}"
        for name in names
        if getattr(base.config, name) != getattr(tuned.config, name)
    ]
    where = f"--{roles[0]}={base.checkpoint.path} --{roles[1]}={tuned.checkpoint.path}"
    if differ:
        raise UserError(f"{where}: expected models of one shape, got {'; '.join(differ)}; give two of one origin")
    if base.mesh != tuned.mesh:
        raise UserError(
            f"{where}: expected models on one mesh, got {dict(base.mesh.shape)} for the {one} and"
            f" {dict(tuned.mesh.shape)} for the {other}; open both with one --mesh"
        )
    ours, theirs = base.tokenizer.get_vocab(), tuned.tokenizer.get_vocab()
    if ours != theirs:
        token = next(token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token))
        raise UserError(
            f"{where}: expected one tokenizer, got two; token {token!r} is {ours.get(token, 'absent')} in the {one} and"
            f" {theirs.get(token, 'absent')} in the {other}"
        )
