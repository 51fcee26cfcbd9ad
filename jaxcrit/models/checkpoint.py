"""Reads a Hugging Face checkpoint directory (or hub id) onto a mesh: each process its own byte ranges, no pickle."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import safe_open

from jaxcrit.core import processes
from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.files import cache_directory, local_path, read_object, write_text
from jaxcrit.core.hashing import sha256_json
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Decoder
from jaxcrit.models.shards import Tensors, find_tensors, read_json_object, same_values
from jaxcrit.models.weights import Weight, hf_shapes, offsets, placement, table
from jaxcrit.parallel.mesh import make_mesh

Progress = Callable[[int, int, str], None]
DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_FILE_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_READ_BYTES = 2**25
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory: config and tensor headers read and checked, no weight read yet.

    Attributes:
        path: the directory.
        config: config of the model.
        shards: by tensor name, the file that holds it.
        dtypes: by tensor name, its dtype in the file (float32, bfloat16, float16).
        names: by tensor name, its name in the file.
        notes: what was decided when the files were chosen, in sentences.
        tokenizer: the directory that its tokenizer is read from; None for ``path``.
        stored: types that the tensors of a GGUF file are dequantised from, with their numbers; elsewhere empty.
    """

    path: Path
    config: ModelConfig
    shards: dict[str, Path]
    dtypes: dict[str, str]
    names: dict[str, str]
    notes: tuple[str, ...] = ()
    tokenizer: Path | None = None
    stored: str = dataclasses.field(default="", kw_only=True)

    def read(self, name: str, rows: slice, columns: slice | None, place: int | None = None) -> np.ndarray:
        """Reads part of a tensor, or of the matrix at a place in it; other bytes of the file are not touched."""
        with safe_open(self.shards[name], framework="numpy") as file:
            part = file.get_slice(self.names[name])
            if place is not None:
                return part[place, rows] if columns is None else part[place, rows, columns]
            return part[rows] if columns is None else part[rows, columns]

    def digests(self, progress: Progress | None = None) -> dict[str, list[Any]]:
        """By tensor name, what identifies it: type, shape and sha256.

        They are kept in the cache directory by path, size and time of each shard, so a checkpoint is read for this
        once; of several processes, each reads its share.

        Args:
            progress: called with (shards done, shards in all, shard).
        """
        found: dict[Path, dict[str, list[Any]]] = {}
        files = sorted(set(self.shards.values()))
        for done, file in enumerate(files):
            if progress is not None:
                progress(done, len(files), file.name)
            with safe_open(file, framework="numpy") as opened:
                names = sorted(opened.keys())
            found[file] = kept_digests(file, names, functools.partial(_digest, file))
        return {name: found[file][self.names[name]] for name, file in self.shards.items()}


def locate(model: str, named: str = "") -> Path:
    """Where a model is: a local path, or a hub id that is fetched (safetensors and small files only).

    Args:
        model: path or hub id.
        named: what named it, for messages, such as ``--base=MODEL``; default the model alone.

    Raises:
        UserError: neither a directory, a GGUF file nor reachable on the hub.
    """
    named = named or model
    path = local_path(model, named=named)
    if path.is_dir() or (path.suffix.lower() == ".gguf" and path.is_file()):
        return path
    if path.exists():
        raise UserError(f"{named}: expected a checkpoint directory, got a file; name the directory it is in")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise UserError(f"{named}: no such directory, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except HFValidationError:
        raise UserError(f"{named}: no such directory, and not a hub id (owner/name)") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{named}: no such directory, and the hub did not give it ({reason})") from None


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads and checks the config and every shard's header against the weight table.

    Raises:
        UserError: no safetensors, a damaged or absent shard, or one line that names every tensor that is
            missing, unexpected, misshapen or of a dtype that is not floating point; for a file, see `open_gguf`.
    """
    if path.suffix.lower() == ".gguf" and path.is_file():
        from jaxcrit.models.gguf import open_gguf

        return open_gguf(path)
    config_path = path / "config.json"
    raw = read_json_object(config_path)
    config = ModelConfig.from_hf(raw, str(config_path))
    tensors = find_tensors(path)
    if config.experts and any(name.endswith(".experts.gate_up_proj") for name in tensors.files):
        config = dataclasses.replace(config, fused_experts=True)
    names, notes = tensors.named({**hf_shapes(config), _HEAD: ()})
    if config.tied and _HEAD in names and _EMBED in names and not _same(tensors, names[_HEAD], names[_EMBED]):
        # As in transformers: the file has the last word. Exported, the config says what the file holds.
        untied = ModelConfig.from_hf({**raw, "tie_word_embeddings": False}, str(config_path))
        config = dataclasses.replace(untied, fused_experts=config.fused_experts)
        notes += (f"config.json says that the head is the embedding; {_HEAD} in the file is another, and is used",)
    expected = hf_shapes(config)
    if config.tied and _EMBED not in names and _HEAD in names:
        names[_EMBED] = names[_HEAD]
        notes += (f"{_HEAD} stands for the embedding too, which the file leaves out",)
    actual = {name: names.get(name, "") for name in expected}
    problems = []
    missing = sorted(name for name in expected if not actual[name])
    allowed = {*actual.values(), *([names[_HEAD]] if config.tied and _HEAD in names else [])}
    extra = sorted(tensors.files.keys() - allowed)
    if missing == [_HEAD] and not config.tied:
        problems.append(f"missing {_HEAD}: a backbone saved without its head; save it with AutoModelForCausalLM")
    elif missing:
        problems.append(f"missing {listed(missing, 4)}")
    if extra:
        problems.append(f"unexpected {listed(extra, 4)}")
    there = [name for name in sorted(expected) if actual[name]]
    shapes, dtypes = ({name: held[actual[name]] for name in there} for held in (tensors.shapes, tensors.dtypes))
    wrong = [name for name in there if expected[name] != shapes[name]]
    if wrong:
        problems.append("wrong shape " + listed([f"{n} {shapes[n]} (expected {expected[n]})" for n in wrong], 4))
    strange = [name for name in there if dtypes[name] not in _FILE_DTYPES]
    if strange:
        problems.append("not float weights " + listed([f"{name} {dtypes[name]}" for name in strange], 4))
    if problems:
        raise UserError(f"{path}: tensors do not match config.json ({config.family}): {'; '.join(problems)}")
    shards = {name: tensors.files[actual[name]] for name in expected}
    kinds = {name: _FILE_DTYPES[str(dtypes[name])] for name in expected}
    return Checkpoint(path, config, shards, kinds, actual, (*tensors.notes, *notes))


def load(
    checkpoint: Checkpoint, *, dtype: str = "", mesh: Mesh | None = None, progress: Progress | None = None
) -> Decoder:
    """Loads the weights, sharded by the table's logical axes.

    Each stacked array is assembled shard by shard from the byte ranges that shard needs, then handed to the
    device; on the host there is never more than one such array, and on CPU not even that twice (the device
    takes the aligned buffer over).

    Args:
        checkpoint: checkpoint from `open_checkpoint`.
        dtype: float32, bfloat16 or float16; default the file's own (float32 where it is mixed).
        mesh: where the weights go; default all of this process's devices.
        progress: called with (weights done, weights in all, path).

    Raises:
        UserError: a tensor that holds NaN or infinity, or a dtype that is not one of the three.
    """
    mesh = make_mesh(None) if mesh is None else mesh
    config, kinds = checkpoint.config, sorted(set(checkpoint.dtypes.values()))
    dtype = dtype or (kinds[0] if len(kinds) == 1 else "float32")
    if dtype not in DTYPES:
        raise UserError(f"--dtype={dtype}: expected {listed(list(DTYPES))}")
    rows, begin = table(config), offsets(config)
    arrays: dict[str, jax.Array] = {}
    finite: dict[str, jax.Array] = {}
    for done, row in enumerate(rows):
        if progress is not None:
            progress(done, len(rows), row.path)
        arrays[row.path] = _load_row(checkpoint, row, begin[row.path], np.dtype(DTYPES[dtype]), mesh)
        finite[row.path] = _finite(arrays[row.path], row.stacked)
    bad = [
        row.names(config, layer)[0] + (" (or of another expert)" if row.of_experts else "")
        for row in rows
        for layer, ok in enumerate(np.atleast_1d(np.asarray(finite[row.path])))
        if not ok
    ]
    if bad:
        raise UserError(
            f"{checkpoint.path}: NaN or infinite values in {listed(bad, 4)} (as {dtype}); weights are damaged"
        )
    if progress is not None:
        progress(len(rows), len(rows), "")
    return Decoder(config, arrays)


def model_hash(checkpoint: Checkpoint, progress: Progress | None = None) -> str:
    """Identity of a model: sha256 of its config and of every tensor's name, dtype, shape and digest.

    Args:
        checkpoint: checkpoint from `open_checkpoint`.
        progress: see `Checkpoint.digests`.
    """
    config = checkpoint.config
    wanted, digests = hf_shapes(config), checkpoint.digests(progress)
    tensors = [[name, *digests[name]] for name in sorted(wanted)]
    ignored = ("_name_or_path", "transformers_version")
    settings = {key: value for key, value in config.to_hf().items() if key not in ignored}
    return sha256_json({"config": settings, "tensors": tensors})


def _same(tensors: Tensors, one: str, other: str) -> bool:
    """Whether two tensors of the files agree, compared in pieces."""
    if tensors.shapes[one] != tensors.shapes[other] or tensors.dtypes[one] != tensors.dtypes[other]:
        return False
    rows, columns = tensors.shapes[one]
    step = max(1, _READ_BYTES // (4 * columns))
    with (
        safe_open(tensors.files[one], framework="numpy") as first,
        safe_open(tensors.files[other], framework="numpy") as second,
    ):
        parts = first.get_slice(one), second.get_slice(other)
        places = (slice(start, min(start + step, rows)) for start in range(0, rows, step))
        return all(same_values(parts[0][place], parts[1][place]) for place in places)


@functools.partial(jax.jit, static_argnames="stacked")
def _finite(array: jax.Array, stacked: bool) -> jax.Array:
    # 0 * x is 0 for finite x alone. One array a call: XLA CPU fuses this into its sum, but keeps a copy of every
    # weight in a program over all of them, and a boolean per weight for jnp.all(jnp.isfinite(x)).
    return jnp.sum(array * 0, axis=tuple(range(1 if stacked else 0, array.ndim))) == 0


def _load_row(checkpoint: Checkpoint, row: Weight, begin: int, dtype: np.dtype, mesh: Mesh) -> jax.Array:
    shape = row.shape(checkpoint.config)
    sharding = NamedSharding(mesh, placement(row.axes, checkpoint.config, mesh, row.hf))
    made: dict[Any, np.ndarray] = {}

    def shard(index: Any) -> np.ndarray:
        key = tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
        if key not in made:  # replicas on several devices of one process read once
            made[key] = _read_shard(checkpoint, row, begin, shape, index, dtype)
        return made[key]

    return jax.make_array_from_callback(shape, sharding, shard)


def _read_shard(
    checkpoint: Checkpoint, row: Weight, begin: int, shape: tuple[int, ...], index: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    """One device's part of one of our arrays, from the byte ranges of the file that hold it."""
    config = checkpoint.config
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    out = _aligned([stop - start for start, stop in bounds], dtype)
    layers = range(*bounds.pop(0)) if row.stacked else [None]
    wanted = slice(*bounds.pop(0)) if row.of_experts else slice(None)
    first, columns = bounds[0][0] + begin, slice(*bounds[1]) if len(bounds) > 1 else None
    places = [place for layer in layers for place in row.places(config, layer)[wanted]]
    lengths = [stop - start for start, stop in bounds]
    # safetensors copies what it reads, and maps whole rows even where some columns are wanted: keep both small.
    step = max(1, _READ_BYTES // (4 * math.prod(row.hf_shape(config)[1:])))
    for part, (name, place) in zip(out.reshape(-1, *lengths), places, strict=True):
        for start in range(0, len(part), step):
            some = slice(first + start, first + min(start + step, len(part)))
            with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite and is named by `load`
                part[start : start + step] = checkpoint.read(name, some, columns, place)
    return out


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An empty array on a 64-byte boundary, which a CPU device takes over without a copy."""
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(count + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count].view(dtype).reshape(shape)


REHASH: contextvars.ContextVar[bool] = contextvars.ContextVar("rehash", default=False)  # --rehash


def kept_digests(file: Path, names: list[str], digest: Callable[[str], list[Any]]) -> dict[str, list[Any]]:
    """``{tensor: [dtype, shape, sha256]}`` of a file, from the cache where it is the same file, untouched since.

    The same is told by path, inode, size, the time it was written and the time the system last changed anything of it,
    which no program can put back. What the cache holds is used where it is of these tensors, else made again.
    """
    state = file.stat()
    stamp = [str(file.resolve()), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]
    kept = cache_directory() / "digests" / f"{sha256_json(stamp)}.json"

    def known() -> dict[str, list[Any]]:
        try:
            found = read_object(kept, "digests", dict[str, list[Any]])
        except (OSError, UserError):
            return {}
        return found if found.keys() == set(names) and all(map(_is_digest, found.values())) else {}

    if digests := {} if REHASH.get() else processes.share(known):
        return digests
    digests, (index, count) = {}, processes.place()
    for mine in processes.gather({name: digest(name) for name in names[index::count]}):
        digests |= mine
    try:
        processes.make_directory(kept.parent)
        write_text(kept, json.dumps(digests))
    except OSError:
        pass  # a cache that cannot be written costs time, not correctness
    return digests


def _is_digest(entry: list[Any]) -> bool:
    """Whether it is a dtype, a shape and a sha256."""
    kinds = [str, list, str]
    return [type(one) for one in entry] == kinds and {*map(type, entry[1])} <= {int} and len(entry[2]) == 64


def _digest(file: Path, name: str) -> list[Any]:
    """Dtype, shape and sha256 of a tensor, read in pieces; a file held open keeps all it has given in memory."""
    digest = hashlib.sha256()
    with safe_open(file, framework="numpy") as opened:
        part = opened.get_slice(name)
        shape = part.get_shape()
        if math.prod(shape) == 0 or not shape:  # none or a scalar: there are no rows to take
            pieces = iter([opened.get_tensor(name)])
        else:
            rows = max(1, _READ_BYTES // (8 * math.prod(shape[1:])))
            pieces = (part[start : min(start + rows, shape[0])] for start in range(0, shape[0], rows))
        for piece in pieces:
            digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
    return [str(piece.dtype), list(shape), digest.hexdigest()]
