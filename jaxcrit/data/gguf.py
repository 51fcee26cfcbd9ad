"""GGUF files: what their header says, and the tokenizer in it.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is read here (49,152 tokens in 0.1 s, for
1.6 s of the `gguf` package's reader, and with one line for whatever is wrong); the package knows the types of tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
import struct
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np

from jaxcrit.core.errors import UserError, first_line, is_error
from jaxcrit.core.reading import plain_size
from jaxcrit.core.schema import Range, conform
from jaxcrit.data.tokenizer import quiet

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_TOKENS = "tokenizer.ggml.tokens"
_MOST_AXES = 8
# What is read of metadata, whatever the architecture; sizes of the model are checked as those of a config.json.
Metadata = TypedDict(
    "Metadata",
    {
        "general.architecture": str,
        "general.type": str,
        "general.alignment": Annotated[int, Range(1, 2**20)],
        "split.count": int,
        "tokenizer.ggml.tokens": list[str],
        "tokenizer.ggml.model": str,
        "tokenizer.ggml.pre": str,
        "tokenizer.ggml.scores": list[float],
        "tokenizer.ggml.token_type": list[int],
        "tokenizer.ggml.merges": list[str],
        "tokenizer.ggml.bos_token_id": int,
        "tokenizer.ggml.eos_token_id": int,
        "tokenizer.ggml.unknown_token_id": int,
        "tokenizer.ggml.padding_token_id": int,
        "tokenizer.ggml.add_bos_token": bool,
        "tokenizer.ggml.add_eos_token": bool,
        "tokenizer.ggml.add_space_prefix": bool,
        "tokenizer.chat_template": str,
    },
    total=False,
)
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file.

    Attributes:
        shape: sizes, outermost first.
        kind: its type, of `gguf.GGMLQuantizationType`.
        start: offset of its first byte in the file.
        size: how many bytes it has.
    """

    shape: tuple[int, ...]
    kind: Any
    start: int
    size: int


@dataclasses.dataclass(frozen=True, eq=False)
class GgufFile:
    """A file's header.

    Attributes:
        path: the file.
        metadata: values by key.
        tensors: by name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def need(self, key: str) -> Any:
        """A value that must be there.

        Raises:
            UserError: it is not.
        """
        if key not in self.metadata:
            raise UserError(f"{self.path}: no {key} in its metadata; expected a whole model: convert it again")
        return self.metadata[key]


def package() -> Any:
    """The `gguf` package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError("GGUF files need the gguf package: pip install 'jaxcrit[gguf]'") from None
    return gguf


def read_gguf(path: Path) -> GgufFile:
    """Reads and checks the header of a file; no tensor is read.

    Raises:
        UserError: no GGUF file, a truncated one, one of several parts, or a tensor of a type that nothing here knows.
    """
    size = plain_size(path, "a GGUF file")
    return _read(path, size, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)  # a model's weights and its tokenizer are opened one after the other
def _read(path: Path, size: int, changed: int) -> GgufFile:
    gguf, header = package(), _Header(path, size)
    if header.take(4) != b"GGUF":
        raise UserError(f"{path}: expected a GGUF file, got other content")
    version = header.number("I")
    if version not in (2, 3):
        raise UserError(f"{path}: expected version 2 or 3 of GGUF, little endian, got {version}")
    tensors, keys = header.number("Q"), header.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = header.string()
        if key in metadata:
            raise UserError(f"{path}: {key} named twice; which one holds cannot be known")
        metadata[key] = header.value(header.number("I"))
    conform(metadata, Metadata, str(path))
    if metadata.get("split.count", 0) > 1:
        raise UserError(f"{path}: one of {metadata['split.count']} parts; merge them with llama-gguf-split --merge")
    found = []
    for _ in range(tensors):
        name = header.string()
        axes = header.number("I")
        if not 1 <= axes <= _MOST_AXES:
            raise UserError(f"{path}: damaged: {name[:80]} has {axes} axes; fetch the file again")
        shape = tuple(header.number("Q") for _ in range(axes))[::-1]
        found.append((name, shape, header.number("I"), header.number("Q")))
    unit = metadata.get("general.alignment", 32)
    begin = -(-header.at // unit) * unit
    placed = {}
    for name, shape, number, offset in found:
        kind = _kind(number)
        if kind is None:
            raise UserError(
                f"{path}: {name[:80]} is of type {number}, which the gguf package here cannot dequantise; take a file"
                " of another type (Q8_0, Q4_K_M ...), or the original checkpoint"
            )
        elements, width = gguf.GGML_QUANT_SIZES[kind]
        length = math.prod(shape) // elements * width
        if begin + offset + length > size:
            raise UserError(f"{path}: truncated: {name[:80]} ends beyond the {size} bytes it has; fetch the file again")
        placed[name] = Tensor(shape, kind, begin + offset, length)
    return GgufFile(path, metadata, placed)


@functools.cache
def _kind(number: int) -> Any:
    """The type of that number, None where it is unknown or cannot be dequantised."""
    gguf = package()
    try:
        kind = gguf.GGMLQuantizationType(number)
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        return None
    return kind


class _Header:
    """The bytes of a header, read one after the other."""

    def __init__(self, path: Path, size: int):
        self.path, self.at = path, 0
        try:
            with path.open("rb") as opened:
                self.bytes: Any = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if self.at + count > len(self.bytes):
            raise UserError(
                f"{self.path}: truncated: its header ends beyond its {len(self.bytes)} bytes; fetch it again"
            )
        self.at += count
        return self.bytes[self.at - count : self.at]

    def number(self, code: str) -> Any:
        """A number, by its letter in `struct`."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        """A text with its length in front."""
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        """A value of metadata: a number, a text or a list."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise UserError(f"{self.path}: damaged: a value of type {kind} in its metadata; fetch the file again")
        inside, count = self.number("I"), self.number("Q")
        if inside not in (*_SCALARS, _STRING):
            raise UserError(f"{self.path}: damaged: a list of values of type {inside} in its metadata; fetch it again")
        if inside == _STRING:
            return [self.value(inside) for _ in range(count)]
        code = f"<{_SCALARS[inside]}"
        return np.frombuffer(self.take(count * struct.calcsize(code)), code).tolist()


def gguf_tokenizer(path: Path) -> Any:
    """The tokenizer in a file, chat template included, built as transformers builds it.

    Raises:
        UserError: see `read_gguf`; none is in it, transformers is too old to build one or knows no such kind, or a
            special token is not in its vocabulary.
    """
    file = read_gguf(path)
    tokens, kind = file.need(_TOKENS), file.need("tokenizer.ggml.model")
    with quiet():
        try:
            from transformers.integrations.gguf.gguf_tokenizer_mapping import (
                GGUF_TOKENIZER_MAPPING,
                convert_gguf_tokenizer,
            )
            from transformers.tokenization_utils_tokenizers import TokenizersBackend
        except ImportError:
            raise UserError(f"{path}: its tokenizer needs a newer transformers: pip install 'jaxcrit[gguf]'") from None
        described, settings = (
            {
                name: file.metadata[f"tokenizer.{key}"]
                for key, name in names.items()
                if f"tokenizer.{key}" in file.metadata
            }
            for names in (GGUF_TOKENIZER_MAPPING["tokenizer"], GGUF_TOKENIZER_MAPPING["tokenizer_config"])
        )
        if kind == "llama":
            settings.setdefault("add_bos_token", True)
        for name, key in _SPECIAL.items():
            number = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
            if number is not None and not 0 <= number < len(tokens):
                raise UserError(f"{path}: {name} is {number}, but its vocabulary has {len(tokens)} tokens")
            settings[name] = None if number is None else tokens[number]
        try:
            backend, further = convert_gguf_tokenizer(file.need("general.architecture"), described)
            return TokenizersBackend(tokenizer_object=backend, **settings, **further)
        except BaseException as error:  # builders of several kinds stand behind this call and share no base class
            if not is_error(error):
                raise
            raise UserError(f"{path}: its tokenizer ({kind}) cannot be built: {first_line(error)}") from None
