"""What every command does first: the mesh, the model on it, its tokenizer and its identity."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxcrit.core import processes
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import as_path, read_json
from jaxcrit.core.hashing import sha256_json
from jaxcrit.core.rundir import RUN_FORMAT
from jaxcrit.data.tokenizer import load_tokenizer
from jaxcrit.models.attention import ASKED, Attention, choose_attention, platform_of
from jaxcrit.models.checkpoint import DTYPES, Checkpoint, load, locate, model_hash, open_checkpoint
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Decoder
from jaxcrit.models.weights import hf_shapes
from jaxcrit.parallel.mesh import default_axes, device_memory, make_mesh, parse_mesh
from jaxcrit.training.partition import Bank, Partition, partition_of_json, split

EMBEDDED_MODEL = Path(__file__).parents[1] / "assets" / "demo_model"
Bars = Callable[..., Any]  # makes a progress bar: called as tqdm with total= and desc=


@dataclasses.dataclass(frozen=True, eq=False)
class Tuned:
    """What a fine-tuning run changed.

    Attributes:
        partition: what it trained.
        params: the trained groups, float32.
        run: its directory.
        step: of the checkpoint read.
    """

    partition: Partition
    params: Bank
    run: Path
    step: int


@dataclasses.dataclass(frozen=True, eq=False)
class Session:
    """An opened model: headers checked, identity known, weights not yet read.

    Attributes:
        checkpoint: directory, config and tensor headers.
        tokenizer: the model's own (transformers).
        model_hash: identity of config and weights.
        mesh: devices.
        dtype: of weights and compute.
        tuned: fine-tuning runs on top of the checkpoint, in order.
        named: what the checkpoint was called: its hub id, or its directory.
    """

    checkpoint: Checkpoint
    tokenizer: Any
    model_hash: str
    mesh: Mesh
    dtype: str
    tuned: tuple[Tuned, ...] = ()
    named: str = ""

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.checkpoint.config

    def attention(self, dtype: str = "") -> str:
        """The form that attention takes for the longest rows, in this dtype of compute; default the session's."""
        stored = list(self.checkpoint.dtypes.values())
        return _form(self.config, dtype or self.dtype or max(stored, key=stored.count))

    def decoder(self, bars: Bars | None = None) -> Decoder:
        """Loads the weights onto the mesh."""
        decoder = self._checkpoint(bars)
        for tuned in self.tuned:
            decoder = Decoder(self.config, tuned.partition.merge(decoder.weights(), tuned.params))
        return decoder

    def _checkpoint(self, bars: Bars | None) -> Decoder:
        if bars is None:
            return load(self.checkpoint, dtype=self.dtype, mesh=self.mesh)
        with bars(total=1, desc="weights") as bar:

            def progress(done: int, total: int, _: str) -> None:
                bar.total = total
                bar.update(done - bar.n)

            return load(self.checkpoint, dtype=self.dtype, mesh=self.mesh, progress=progress)


def open_session(
    model: str, *, mesh: str | Mesh = "", dtype: str = "", step: str = "", bars: Bars | None = None
) -> Session:
    """Opens a checkpoint directory, a hub id, a fine-tuning run, or (with an empty name) the embedded model.

    Args:
        model: as above.
        mesh: such as ``data=4,fsdp=2``, or made already; default as of `default_axes`.
        dtype: default float32 on CPU, where bfloat16 is slower, and the file's own elsewhere.
        step: of a run, which checkpoint: a number, ``best``, ``last``; default where training ended.
        bars: makes progress bars.

    Raises:
        UserError: see `open_checkpoint`, `load_tokenizer`, `make_mesh`, `choose_attention`; or a run that is no
            fine-tuning, has no such checkpoint, or whose model is gone or has changed.
    """
    if model and (as_path(model) / "run.json").is_file():
        return _open_run(as_path(model), mesh, dtype, step, bars)
    asked = {} if isinstance(mesh, Mesh) else parse_mesh(mesh)
    path = locate(model) if model else EMBEDDED_MODEL
    checkpoint = open_checkpoint(path)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "")
    devices = mesh if isinstance(mesh, Mesh) else make_mesh(asked or _default_mesh(checkpoint, dtype))
    how = Attention(ASKED.get(), platform_of(devices.devices.flat[0]), devices)
    checkpoint = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, attention=how))
    _form(checkpoint.config, "bfloat16")  # which every form knows: what else keeps it from this model is said first
    tokenizer = load_tokenizer(path)
    named = str(path.resolve()) if not model or Path(model).expanduser().exists() else model
    return Session(checkpoint, tokenizer, model_hash(checkpoint), devices, dtype, named=named)


def _default_mesh(checkpoint: Checkpoint, dtype: str) -> dict[str, int]:
    """The mesh where none is asked for, by the size of the weights and of a device's memory."""
    kinds = {dtype} if dtype else set(checkpoint.dtypes.values())
    width = max(np.dtype(DTYPES[kind]).itemsize for kind in kinds)
    weights = width * sum(math.prod(shape) for shape in hf_shapes(checkpoint.config).values())
    return default_axes(weights, checkpoint.config.width, jax.device_count(), device_memory(jax.local_devices()))


def _form(config: ModelConfig, dtype: str) -> str:
    how = config.attention
    rows = 1 if how.mesh is None else how.mesh.size
    return choose_attention(how, DTYPES[dtype], rows, config.max_length, config.num_heads, config.head_dim)[0]


def _open_run(run: Path, mesh: str | Mesh, dtype: str, step: str, bars: Bars | None) -> Session:
    record = read_json(run / "run.json", RUN_FORMAT)
    if record.get("command") != "finetune":
        raise UserError(f"{run}: is a run of jaxcrit {record.get('command')}; expected a checkpoint or a finetune run")
    try:
        base, trained = record["model"], record["trained"]
        step = step or str(record.get("result", {}).get("model_step", "last"))
    except KeyError as error:
        raise UserError(f"{run}: has no {error} in run.json yet; let jaxcrit finetune run on") from None
    below = open_session(base["path"], mesh=mesh, dtype=dtype, bars=bars)
    if below.model_hash != base["hash"]:
        raise UserError(
            f"{run}: was trained on {base['path'] or 'the embedded model'} with hash {base['hash'][:12]}, which now has"
            f" {below.model_hash[:12]}; put the original back"
        )
    from jaxcrit.training.checkpoints import trained_parameters

    parts = partition_of_json(below.config, trained)
    like, _ = split(parts.abstract(below.mesh, np.float32))
    params, found = trained_parameters(run, like, step)
    identity = sha256_json({"base": below.model_hash, "trained": trained, "params": _digests(params)})
    return dataclasses.replace(
        below, model_hash=identity, tuned=(*below.tuned, Tuned(parts, params, run.resolve(), found))
    )


def _digests(params: Bank) -> dict[str, str]:
    return {
        f"{group}/{path}": hashlib.sha256(np.ascontiguousarray(processes.whole(value)).tobytes()).hexdigest()
        for group, entries in params.items()
        for path, value in entries.items()
    }
