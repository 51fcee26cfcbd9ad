"""Loads the tokenizer of a checkpoint directory through transformers, quietly and without running code from it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from jaxcrit.core.errors import UserError, first_line, is_error
from jaxcrit.core.files import read_object
from jaxcrit.core.reading import plain_tree

# What holds the vocabulary in the checkpoints served; any one of them will do.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_BACKEND = "transformers.tokenization_utils_tokenizers", "TokenizersBackend"
# Classes by the name that tokenizer_config.json gives, without "Fast": module and class of transformers.
_CLASSES = {
    "PreTrainedTokenizer": _BACKEND,
    "TokenizersBackend": _BACKEND,
    "LlamaTokenizer": ("transformers.models.llama.tokenization_llama", "LlamaTokenizer"),
    "GPT2Tokenizer": ("transformers.models.gpt2.tokenization_gpt2", "GPT2Tokenizer"),
    "GemmaTokenizer": ("transformers.models.gemma.tokenization_gemma", "GemmaTokenizer"),
    "Qwen2Tokenizer": ("transformers.models.qwen2.tokenization_qwen2", "Qwen2Tokenizer"),
}
# Model types for which transformers takes that name at its word, and those for which it has a class of its own.
_AT_ITS_WORD = (None, "llama", "smollm3", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text")
_OWN = {"qwen2": "Qwen2Tokenizer"} | dict.fromkeys(("phi3", "olmo2", "olmo3", "granite"), "TokenizersBackend")


def load_tokenizer(path: str | Path) -> Any:
    """Loads a tokenizer from a directory, never from a network.

    An ``auto_map`` (code shipped with the checkpoint) is ignored where transformers has the named class
    itself, and refused where only that code could load the tokenizer; it is never run.

    Args:
        path: a Hugging Face checkpoint directory, or a GGUF file.

    Returns:
        A transformers tokenizer.

    Raises:
        UserError: no such directory, no tokenizer in it, one that needs sentencepiece where that is not installed, or
            one that transformers cannot read.
    """
    path = Path(path)
    if path.suffix.lower() == ".gguf":
        from jaxcrit.data.gguf import gguf_tokenizer

        return gguf_tokenizer(path)
    if not path.is_dir():
        raise UserError(f"{path}: expected a checkpoint directory with a tokenizer, got no directory")
    plain_tree(path, "files of a checkpoint", (".json", ".jinja", ".model", ".txt"))
    found = [name for name in _VOCABULARIES if (path / name).is_file()]
    if not found:
        raise UserError(
            f"{path}: expected a tokenizer ({', '.join(_VOCABULARIES)}), found none;"
            " copy the tokenizer files of the model there"
        )
    if found == ["tokenizer.model"]:
        _require_sentencepiece(path / "tokenizer.model")
    with quiet():
        try:
            loaded = _class(path).from_pretrained(path, local_files_only=True, trust_remote_code=False)
            loaded(["a"])  # settings of other types than expected are noticed only now
            return loaded
        # Readers of many formats stand behind this call and share no base class (tokenizers raises Exception itself).
        except BaseException as error:
            if not is_error(error):
                raise
            why = first_line(error)
            raise UserError(
                f"{path}: the tokenizer cannot be loaded (code shipped with a checkpoint is never run): {why}"
            ) from None


def has_tokenizer(path: Path) -> bool:
    """Whether a directory holds a vocabulary."""
    return any((path / name).is_file() for name in _VOCABULARIES)


class NamedTemplate(TypedDict):
    """One of several chat templates."""

    name: str
    template: str


class TokenizerConfig(TypedDict, total=False):
    """What is read here of ``tokenizer_config.json``."""

    tokenizer_class: str | None
    auto_map: Any
    chat_template: str | list[NamedTemplate] | None


def _class(path: Path) -> Any:
    """The class that ``AutoTokenizer`` would take, where that is certain without it; else ``AutoTokenizer``.

    ``AutoTokenizer`` imports the configs of all models, and torch where that is installed: seconds and hundreds of
    megabytes, for the same tokenizer.
    """
    settings, config = _object(path / "tokenizer_config.json", TokenizerConfig), _object(path / "config.json")
    family = config.get("model_type")
    named = str(settings.get("tokenizer_class") or config.get("tokenizer_class") or "").removesuffix("Fast")
    if not (family is None or isinstance(family, str)) or family not in _AT_ITS_WORD:
        named = _OWN.get(str(family), "")
    file = path / "tokenizer.json"
    # LlamaTokenizer splits as sentencepiece does; for a file that splits bytes transformers takes another class.
    bytewise = named == "LlamaTokenizer" and file.is_file() and b'"ByteLevel"' in file.read_bytes()
    if not file.is_file() or "auto_map" in settings or named not in _CLASSES or bytewise:
        from transformers import AutoTokenizer

        return AutoTokenizer
    module, name = _CLASSES[named]
    return getattr(importlib.import_module(module), name)


def _object(path: Path, kind: Any = dict[str, Any]) -> dict[str, Any]:
    """A JSON object; empty where there is no such file.

    Raises:
        UserError: it is something else.
    """
    return read_object(path, "a JSON object", kind) if path.exists() else {}


def _require_sentencepiece(file: Path) -> None:
    with file.open("rb") as opened:
        begins = opened.read(1)
    # Protocol buffers begin with the tag of the first piece; a tiktoken file of the same name is text.
    missing = [name for name in ("sentencepiece", "google.protobuf") if begins == b"\n" and not _installed(name)]
    if missing:
        raise UserError(
            f"{file}: a sentencepiece model, which needs {' and '.join(missing)}; pip install 'jaxcrit[sentencepiece]',"
            " or put the tokenizer.json of the model beside it"
        )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Holds back log lines up to warnings: transformers greets a machine without torch with one."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
