"""Which files of a directory hold which tensor: chosen as transformers chooses, recognised where they are others.

``model.safetensors`` comes first, then the files that ``model.safetensors.index.json`` names; no others. What was
decided, and what lies beside it unread, is noted for ``run.json`` and ``jaxcrit inspect``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import ml_dtypes  # noqa: F401  (with it numpy knows bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.reading import parse_json, read_text, safetensors_header
from jaxcrit.core.schema import conform

SINGLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
_LFS = b"version https://git-lfs"
# Names of tensors that quantised weights consist of, and who writes them.
_QUANTISED = {
    r"\.(absmax|quant_map|nested_absmax|SCB)$|\.quant_state\.": "bitsandbytes",
    r"\.g_idx$": "GPTQ",
    r"\.(qweight|qzeros)$": "AWQ or GPTQ",
    r"\.biases$": "MLX",
    r"\.(weight_scale(_inv)?|input_scale|weight_packed|weight_scale_2)$": "fp8, NVFP4 or compressed-tensors",
    r"\.W_q$": "HQQ",
}
# What wraps a model puts its own name in front of the names of tensors.
_WRAPPERS = {
    "_orig_mod.": "torch.compile; save model._orig_mod",
    "module.": "DistributedDataParallel or DeepSpeed; save model.module",
    "base_model.model.": "PEFT; save model.merge_and_unload(), or the adapter alone",
    "_fsdp_wrapped_module.": "FSDP; gather the full state dict and save that",
    "language_model.": "a model of images and text; save its language model",
    "transformer.": "another layout; convert it with transformers",
}
# Buffers that old checkpoints carry and that the config determines.
_COMPUTED = re.compile(r".*rotary_emb\.inv_freq$")


@dataclasses.dataclass(frozen=True)
class Tensors:
    """Tensors of a directory's files, by name.

    Attributes:
        files: file that holds each.
        shapes: shape of each.
        dtypes: dtype of each, as the file calls it.
        notes: what was decided, in sentences.
    """

    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    notes: tuple[str, ...]

    def named(self, expected: Mapping[str, Any]) -> tuple[dict[str, str], tuple[str, ...]]:
        """The name in the file of each expected tensor that is there, and the notes about names.

        As transformers does, a backbone's names are taken with ``model.`` in front, and a model's without it.

        Raises:
            UserError: what wrapped the model has put its name in front of all tensors.
        """
        found, said = {}, []
        for name in expected:
            for actual in (name, name.removeprefix("model."), f"model.{name}"):
                if actual in self.files:
                    found[name] = actual
                    break
        renamed = sorted(actual for name, actual in found.items() if actual != name)
        if renamed:
            said.append(
                f"names of {len(renamed)} tensors, such as {renamed[0]}, are taken with and without model. alike"
            )
        if len(found) < len(expected) / 2:
            some = max(expected, key=len)
            fronts = {actual.removesuffix(some) for actual in self.files if actual.endswith(some)}
            if fronts:
                front = min(fronts, key=len)
                who = "; ".join(text for wrapper, text in _WRAPPERS.items() if wrapper in front)
                raise UserError(
                    f"{next(iter(self.files.values())).parent}: all names of tensors have the prefix {front!r}"
                    f" ({who or 'of something that wraps the model'}), under which transformers finds none of them"
                )
        return found, tuple(said)


def find_tensors(path: Path) -> Tensors:
    """Reads the headers of the files that a checkpoint directory consists of.

    Raises:
        UserError: no safetensors, a damaged or absent file, an index that is none, a tensor whose file cannot be known,
            or quantised weights.
    """
    files, said, notes = _chosen(path)
    every: dict[Path, dict[str, tuple[tuple[int, ...], str]]] = {file: _header_of(file) for file in sorted(files)}
    found: dict[str, Path] = {}
    for file, held in every.items():  # in the order of their names, the last counts: so transformers reads them
        for name in held:
            if name in found and said.get(name) != file and not _equal(found[name], file, name):
                raise UserError(
                    f"{path}: {name} is in {found[name].name} and in {file.name} with other values; transformers would"
                    f" read {file.name}, {INDEX} says {said[name].name if name in said else 'nothing'}"
                )
            found[name] = file
    lost = sorted(name for name in said if name not in found)
    if lost:
        raise UserError(f"{said[lost[0]]}: the index says it holds {listed(lost, 4)}, but it does not")
    moved = sorted(name for name, file in said.items() if found[name] != file)
    if moved:
        notes.append(
            f"{INDEX} names another file for {listed(moved, 3)}; read from {found[moved[0]].name}, in which it is"
        )
    found = {name: file for name, file in found.items() if not _COMPUTED.match(name)}
    for pattern, writer in _QUANTISED.items():
        strange = sorted(name for name in found if re.search(pattern, name))
        if strange:
            raise UserError(
                f"{found[strange[0]]}: quantised weights ({writer}, by {strange[0]}); expected float weights: use the"
                " original model"
            )
    shapes, dtypes = ({name: every[file][name][at] for name, file in found.items()} for at in (0, 1))
    return Tensors(found, shapes, dtypes, tuple(notes))  # type: ignore[arg-type]


def read_json_object(path: Path, kind: Any = dict[str, Any]) -> dict[str, Any]:
    """A JSON object of a checkpoint directory.

    Args:
        path: file.
        kind: declaration of what it holds, see `jaxcrit.core.schema`.

    Raises:
        UserError: no such file, something else in it, or a key named twice.
    """
    expected = "a JSON object"
    try:
        text = read_text(path, expected)
    except FileNotFoundError:
        if (path.parent / ADAPTER).is_file():
            raise UserError(
                f"{path.parent}: an adapter of PEFT ({ADAPTER}) without a {path.name}; expected a checkpoint directory"
                " here: name its base"
            ) from None
        raise UserError(f"{path.parent}: no {path.name}; expected a Hugging Face checkpoint directory") from None
    if text.startswith(_LFS.decode()):
        refuse_pointer(path)
    return conform(parse_json(text, path, expected), kind, str(path))


def refuse_pointer(file: Path) -> None:
    """Refuses what Git LFS leaves in the place of a file that was not fetched.

    Raises:
        UserError: the file is such a pointer.
    """
    with file.open("rb") as opened:
        if opened.read(len(_LFS)) == _LFS:
            raise UserError(f"{file}: a Git LFS pointer in the place of the file; fetch the files with git lfs pull")


class Index(TypedDict):
    """What is read of ``model.safetensors.index.json``."""

    weight_map: dict[str, str]


def _chosen(path: Path) -> tuple[list[Path], dict[str, Path], list[str]]:
    """Files to read, the file in which the index says each tensor is, and what was decided."""
    index, single = path / INDEX, path / SINGLE
    there = {file.name for file in path.glob("*.safetensors")} - {"adapter_model.safetensors"}
    if single.is_file():
        notes = [f"{SINGLE} is read; {INDEX} beside it is not, as in transformers"] if index.exists() else []
        return [single], {}, [*notes, *_unread(there - {SINGLE})]
    if index.exists():
        named = read_json_object(index, Index)["weight_map"]
        if not named:
            raise UserError(f"{index}: expected a weight_map of tensor names to files, got an empty one")
        for tensor, file in sorted(named.items()):
            odd = file in ("", ".", "..") or Path(file).name != file or "\\" in file
            if odd or len(file.encode("utf-8", "replace")) > 255:
                raise UserError(f"{index}: {tensor} is said to be in {file!r}; expected a file name in {path}, no path")
        files = set(named.values())
        absent = sorted(file for file in files if not (path / file).is_file())
        if absent:
            others = f", which has {listed(sorted(there - files), 3)}" if there - files else ""
            raise UserError(
                f"{index}: names shards that are not in {path}{others}: {listed(absent, 4)}; fetch them again"
            )
        said = {tensor: path / file for tensor, file in named.items()}
        return [path / file for file in files], said, _unread(there - files)
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in path.glob(pattern))
    if there:
        raise UserError(
            f"{path}: expected {SINGLE} or {INDEX}, found neither but {listed(sorted(there), 3)}, which transformers"
            f" does not look for; if it is the whole model in Hugging Face's names, call it {SINGLE}"
        )
    if pickled:
        raise UserError(
            f"{path}: only {listed(pickled, 3)}; expected safetensors (pickled weights can run code and are not"
            " read): convert with transformers' save_pretrained"
        )
    raise UserError(f"{path}: expected {SINGLE} or {INDEX}, found neither")


def _unread(names: set[str]) -> list[str]:
    return [f"not read, as in transformers: {listed(sorted(names), 4)}"] if names else []


def _header_of(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each tensor of a file."""
    try:
        refuse_pointer(file)
        header = safetensors_header(file)
        with safe_open(file, framework="numpy") as opened:
            parse_json(header, file)  # of two tensors of a name one would be kept
            names = list(opened.keys())
            parts = {name: opened.get_slice(name) for name in names}
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except UserError:
        raise
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{file}: truncated or damaged safetensors ({error}); fetch the file again") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None


def _equal(one: Path, other: Path, name: str) -> bool:
    with safe_open(one, framework="numpy") as first, safe_open(other, framework="numpy") as second:
        return same_values(first.get_tensor(name), second.get_tensor(name))


def same_values(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two tensors agree in dtype, shape and bits."""
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
