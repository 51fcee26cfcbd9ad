"""Loads the tokenizer of a checkpoint directory through transformers, quietly and without running code from it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxcrit.core.errors import UserError

# What holds the vocabulary in the checkpoints served; any one of them will do.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(path: str | Path) -> Any:
    """Loads a tokenizer from a directory, never from a network.

    An ``auto_map`` (code shipped with the checkpoint) is ignored where transformers has the named class
    itself, and refused where only that code could load the tokenizer; it is never run.

    Args:
        path: a Hugging Face checkpoint directory, or a GGUF file.

    Returns:
        A transformers tokenizer.

    Raises:
        UserError: no such directory, no tokenizer in it, or one that transformers cannot read.
    """
    path = Path(path)
    if path.suffix.lower() == ".gguf":
        from jaxcrit.data.gguf import gguf_tokenizer

        return gguf_tokenizer(path)
    if not path.is_dir():
        raise UserError(f"{path}: expected a checkpoint directory with a tokenizer, got no directory")
    if not any((path / name).is_file() for name in _VOCABULARIES):
        raise UserError(
            f"{path}: expected a tokenizer ({', '.join(_VOCABULARIES)}), found none;"
            " copy the tokenizer files of the model there"
        )
    with quiet():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        # Readers of many formats stand behind this call and share no base class (tokenizers raises Exception itself).
        except Exception as error:
            first = (str(error).strip() or repr(error)).splitlines()[0]
            raise UserError(
                f"{path}: the tokenizer cannot be loaded (code shipped with a checkpoint is never run): {first}"
            ) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Holds back log lines up to warnings: transformers greets a machine without torch with one."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
