"""Reads a Hugging Face checkpoint directory (or hub id) onto a mesh: each process its own byte ranges, no pickle."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open

from jaxcrit.core import processes
from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.files import local_path, write_text
from jaxcrit.core.hashing import sha256_json
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Decoder
from jaxcrit.models.weights import Weight, hf_shapes, offsets, table
from jaxcrit.parallel.mesh import make_mesh, spec_for

Progress = Callable[[int, int, str], None]
DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_FILE_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_READ_BYTES = 2**25
_INDEX = "model.safetensors.index.json"
# Buffers that old checkpoints carry and that the config determines.
_COMPUTED = re.compile(r".*rotary_emb\.inv_freq$")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory: config and tensor headers read and checked, no weight read yet.

    Attributes:
        path: the directory.
        config: config of the model.
        shards: by tensor name, the file that holds it.
        dtypes: by tensor name, its dtype in the file (float32, bfloat16, float16).
        stored: types that the tensors of a GGUF file are dequantised from, with their numbers; elsewhere empty.
    """

    path: Path
    config: ModelConfig
    shards: dict[str, Path]
    dtypes: dict[str, str]
    stored: str = dataclasses.field(default="", kw_only=True)

    def read(self, name: str, rows: slice, columns: slice | None) -> np.ndarray:
        """Reads part of a tensor; other bytes of the file are not touched."""
        with safe_open(self.shards[name], framework="numpy") as file:
            part = file.get_slice(name)
            return part[rows] if columns is None else part[rows, columns]

    def digests(self, progress: Progress | None = None) -> dict[str, list[Any]]:
        """By tensor name, what identifies it: type, shape and sha256."""
        found: dict[str, list[Any]] = {}
        files = sorted(set(self.shards.values()))
        for done, file in enumerate(files):
            if progress is not None:
                progress(done, len(files), file.name)
            with safe_open(file, framework="numpy") as opened:
                names = sorted(opened.keys())
            found |= kept_digests(file, names, functools.partial(_digest, file))
        return found


def locate(model: str) -> Path:
    """Where a model is: a local path, or a hub id that is fetched (safetensors and small files only).

    Raises:
        UserError: neither a directory, a GGUF file nor reachable on the hub.
    """
    path = local_path(model, "model")
    if path.is_dir() or (path.suffix.lower() == ".gguf" and path.is_file()):
        return path
    if path.exists():
        raise UserError(f"--model={model}: expected a checkpoint directory, got a file; name the directory it is in")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise UserError(f"--model={model}: no such directory, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--model={model}: no such directory, and the hub did not give it ({reason})") from None


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
    config = ModelConfig.from_hf(_json_object(config_path), str(config_path))
    shards, shapes, dtypes = _headers(_shard_files(path))
    expected = hf_shapes(config)
    if config.tied:  # some exporters write the tied head a second time
        shapes.pop("lm_head.weight", None)
    problems = []
    missing, extra = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    if missing:
        problems.append(f"missing {listed(missing, 4)}")
    if extra:
        problems.append(f"unexpected {listed(extra, 4)}")
    wrong = sorted(name for name in expected.keys() & shapes.keys() if expected[name] != shapes[name])
    if wrong:
        problems.append("wrong shape " + listed([f"{n} {shapes[n]} (expected {expected[n]})" for n in wrong], 4))
    strange = sorted(name for name in expected.keys() & shapes.keys() if dtypes[name] not in _FILE_DTYPES)
    if strange:
        problems.append("not float weights " + listed([f"{name} {dtypes[name]}" for name in strange], 4))
    if problems:
        raise UserError(f"{path}: tensors do not match config.json ({config.family}): {'; '.join(problems)}")
    return Checkpoint(path, config, shards, {name: _FILE_DTYPES[dtypes[name]] for name in expected})


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
        row.hf.format(layer)
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

    Digests are kept in the cache directory by path, size and time of each shard, so a checkpoint is read
    for this once; of several processes, each reads its share.
    """
    config = checkpoint.config
    wanted, digests = hf_shapes(config), checkpoint.digests(progress)
    tensors = [[name, *digests[name]] for name in sorted(wanted)]
    ignored = ("_name_or_path", "transformers_version")
    settings = {key: value for key, value in config.to_hf().items() if key not in ignored}
    return sha256_json({"config": settings, "tensors": tensors})


def cache_directory() -> Path:
    """Where jaxcrit keeps what can be made again: ``$JAXCRIT_CACHE``, else the user's cache directory."""
    named = os.environ.get("JAXCRIT_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else base / "jaxcrit"


@functools.partial(jax.jit, static_argnames="stacked")
def _finite(array: jax.Array, stacked: bool) -> jax.Array:
    # 0 * x is 0 for finite x alone. One array a call: XLA CPU fuses this into its sum, but keeps a copy of every
    # weight in a program over all of them, and a boolean per weight for jnp.all(jnp.isfinite(x)).
    return jnp.sum(array * 0, axis=tuple(range(1 if stacked else 0, array.ndim))) == 0


def _load_row(checkpoint: Checkpoint, row: Weight, begin: int, dtype: np.dtype, mesh: Mesh) -> jax.Array:
    shape = row.shape(checkpoint.config)
    sharding = NamedSharding(mesh, spec_for(row.axes, shape, mesh, row.hf))
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
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    layers = range(*bounds.pop(0)) if row.stacked else [None]
    sizes = list(shape[1:] if row.stacked else shape)
    ranges, axis = [], 0
    for group in row.groups:
        inner = int(np.prod(sizes[axis + 1 : axis + len(group)], dtype=np.int64))
        # Within a group only the outermost axis is ever sharded (heads, not head_dim): rows stay contiguous.
        ranges.append(slice(bounds[axis][0] * inner, bounds[axis][1] * inner))
        axis += len(group)
    rows = slice(ranges[0].start + begin, ranges[0].stop + begin)
    columns = ranges[1] if len(ranges) > 1 else None
    lengths = [stop - start for start, stop in bounds]
    out = _aligned(([len(layers)] if row.stacked else []) + lengths, dtype)
    for slot, layer in enumerate(layers):
        name, part = row.hf.format(layer), out[slot] if row.stacked else out
        flat = part.reshape(rows.stop - rows.start, -1)
        # safetensors copies what it reads, and maps whole rows even where some columns are wanted: keep both small.
        step = max(1, _READ_BYTES // (4 * math.prod(row.hf_shape(checkpoint.config)[1:])))
        for start in range(0, len(flat), step):
            some = slice(rows.start + start, min(rows.start + start + step, rows.stop))
            with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite and is named by `load`
                flat[start : start + step] = checkpoint.read(name, some, columns).reshape(-1, flat.shape[1])
    return out


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An empty array on a 64-byte boundary, which a CPU device takes over without a copy."""
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(count + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count].view(dtype).reshape(shape)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = _parse(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no {path.name}; expected a Hugging Face checkpoint directory") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a JSON object, got something else ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _parse(text: str, where: Path) -> Any:
    """JSON in which every object names each key once (Python's own parser keeps the last of several)."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        count = collections.Counter(name for name, _ in pairs)
        twice = sorted(name for name, times in count.items() if times > 1)
        if twice:
            raise UserError(f"{where}: {listed(twice, 4)} named twice; which one holds cannot be known")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique)


def _shard_files(path: Path) -> dict[Path, set[str] | None]:
    """Files to read, each with the tensors the index says it holds (None: all of them)."""
    index, single = path / _INDEX, path / "model.safetensors"
    if index.exists():
        named = _json_object(index).get("weight_map")
        if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
            raise UserError(f"{index}: expected a weight_map of tensor names to files")
        files: dict[Path, set[str] | None] = {}
        for tensor, file in named.items():
            if file in ("", ".", "..") or Path(file).name != file or "\\" in file:
                raise UserError(f"{index}: {tensor} is said to be in {file!r}; expected a file name in {path}, no path")
            holds = files.setdefault(path / file, set())
            assert holds is not None
            holds.add(tensor)
        absent = sorted(file.name for file in files if not file.is_file())
        if absent:
            raise UserError(f"{index}: names shards that are not in {path}: {listed(absent, 4)}; fetch them again")
        return files
    if single.is_file():
        return {single: None}
    others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in path.glob(pattern))
    if others:
        raise UserError(
            f"{path}: only {listed(others, 3)}; expected safetensors (pickled weights can run code and are not"
            " read): convert with transformers' save_pretrained"
        )
    raise UserError(f"{path}: expected model.safetensors or {_INDEX}, found neither")


def _headers(
    files: dict[Path, set[str] | None],
) -> tuple[dict[str, Path], dict[str, tuple[int, ...]], dict[str, str]]:
    shards: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for file, said in files.items():
        try:
            with safe_open(file, framework="numpy") as opened:
                names = list(opened.keys())
                _parse(_header(file), file)  # safe_open would keep one of two tensors of a name
                for name in names:
                    if name in shards:
                        raise UserError(f"{file}: tensor {name} is also in {shards[name].name}; expected each once")
                    if _COMPUTED.match(name):
                        continue
                    part = opened.get_slice(name)
                    shards[name], shapes[name], dtypes[name] = file, tuple(part.get_shape()), part.get_dtype()
        except SafetensorError as error:
            raise UserError(f"{file}: truncated or damaged safetensors ({error}); fetch the file again") from None
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
        if said is not None and said - set(names):
            lost = sorted(said - set(names))
            raise UserError(f"{file}: the index says it holds {listed(lost, 4)}, but it does not")
    return shards, shapes, dtypes


def _header(file: Path) -> str:
    """The JSON at the start of a safetensors file: 8 bytes of its length, little endian, then itself."""
    with file.open("rb") as opened:
        return opened.read(int.from_bytes(opened.read(8), "little")).decode("utf-8")


def kept_digests(file: Path, names: list[str], digest: Callable[[str], list[Any]]) -> dict[str, list[Any]]:
    """``{tensor: [dtype, shape, sha256]}`` of a file, from the cache where its path, size and time are the same."""
    state = file.stat()
    stamp = [str(file.resolve()), state.st_size, state.st_mtime_ns]
    kept = cache_directory() / "digests" / f"{sha256_json(stamp)}.json"

    def known() -> dict[str, list[Any]]:
        try:
            return json.loads(kept.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    if digests := processes.share(known):
        return digests
    index, count = processes.place()
    for mine in processes.gather({name: digest(name) for name in names[index::count]}):
        digests |= mine
    try:
        processes.make_directory(kept.parent)
        write_text(kept, json.dumps(digests))
    except OSError:
        pass  # a cache that cannot be written costs time, not correctness
    return digests


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
