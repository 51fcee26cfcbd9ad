"""Writes a checkpoint directory that transformers loads; weights that did not change come back bit for bit."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.files import atomic_path, local_path, write_text
from jaxcrit.data.tokenizer import load_tokenizer
from jaxcrit.models.checkpoint import DTYPES, Checkpoint, Progress, load, locate, open_checkpoint
from jaxcrit.models.decoder import Decoder
from jaxcrit.models.weights import hf_shapes, to_hf
from jaxcrit.parallel.mesh import make_mesh

# Everything beside the weights that a user of the directory needs.
_CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_SHARD_BYTES = 5 * 10**9


def export(
    model: str,
    out: str,
    *,
    dtype: str = "",
    progress: Progress | None = None,
    beside: Mapping[str, str] | None = None,
) -> Path:
    """Loads a checkpoint and writes it again, through the weight table both ways.

    Args:
        model: directory or hub id.
        out: directory to make; must not exist or be empty.
        dtype: dtype of the weights written; default each tensor's own.
        progress: called with (weights done, weights in all, path).
        beside: texts of further files, by name.

    Returns:
        The directory written.

    Raises:
        UserError: a checkpoint that cannot be read, or an ``out`` that holds something.
    """
    if dtype and dtype not in DTYPES:
        raise UserError(f"--dtype={dtype}: expected {listed(list(DTYPES))}")
    checkpoint = open_checkpoint(locate(model))
    target = local_path(out, "out")
    check_free(target)
    # Nothing is computed, so the weights stay on the host and no accelerator needs room for them.
    host = make_mesh({"data": 1}, jax.devices("cpu")[:1])
    decoder = load(checkpoint, mesh=host, progress=progress)
    return write_checkpoint(decoder, checkpoint, target, dtype=dtype, beside=beside)


def write_checkpoint(
    decoder: Decoder,
    source: Checkpoint,
    out: Path,
    *,
    dtype: str = "",
    shard_bytes: int = _SHARD_BYTES,
    before: Mapping[str, str] | None = None,
    beside: Mapping[str, str] | None = None,
) -> Path:
    """Writes a decoder as a checkpoint directory, whole or not at all.

    Args:
        decoder: the weights.
        source: where the config, the tokenizer and each tensor's dtype come from.
        out: directory to make.
        dtype: float32, bfloat16 or float16 for every tensor; default as in the source.
        shard_bytes: largest safetensors file; no more than one file is held in memory.
        before: by name of a tensor, what the source calls it; of a model with layers left out.
        beside: texts of further files, by name.

    Returns:
        ``out``.

    Raises:
        UserError: ``out`` exists and is not empty, or cannot be made.
    """
    check_free(out)
    called = before or {}
    kinds = {name: dtype or source.dtypes[called.get(name, name)] for name in hf_shapes(decoder.config)}
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".part"))
    try:
        _write_weights(decoder, kinds, temporary, shard_bytes)
        config = decoder.config.to_hf()
        if dtype:
            config["dtype" if "dtype" in config else "torch_dtype"] = dtype
        (temporary / "config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        if source.stored:
            load_tokenizer(source.path).save_pretrained(temporary)
        for name in _CARRIED:
            folder = source.path if name == "generation_config.json" else source.tokenizer or source.path
            if (folder / name).is_file():
                shutil.copyfile(folder / name, temporary / name)
        for name, text in (beside or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        temporary.chmod(0o755)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def check_free(out: Path) -> None:
    """Refuses a directory to make that exists and is not empty, or that cannot be made.

    Raises:
        UserError: which of the two.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise UserError(f"--out={out}: exists and is not an empty directory; choose another, or remove it")
    parent = next(parent for parent in out.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written ({error.strerror}); choose another") from None


def _write_weights(decoder: Decoder, kinds: dict[str, str], directory: Path, shard_bytes: int) -> None:
    shapes = hf_shapes(decoder.config)
    size = {name: math.prod(shapes[name]) * np.dtype(DTYPES[kind]).itemsize for name, kind in kinds.items()}
    shards = list(_split([name for name in shapes], size, shard_bytes))
    tensors = to_hf(decoder)
    weight_map: dict[str, str] = {}
    for number, count in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        held = {}
        for _ in range(count):
            name, value = next(tensors)
            held[name] = np.ascontiguousarray(value.astype(DTYPES[kinds[name]]))
        with atomic_path(directory / file) as temporary:  # safetensors makes private files; this one readable
            save_file(held, temporary, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(directory / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _split(names: list[str], size: dict[str, int], limit: int) -> Iterator[int]:
    """How many tensors go in each file: as many as fit, at least one."""
    count = held = 0
    for name in names:
        if count and held + size[name] > limit:
            yield count
            count = held = 0
        count, held = count + 1, held + size[name]
    yield count
