"""Loading a float32 checkpoint as float32: a row of the table, beside transformers."""

from __future__ import annotations

from pathlib import Path

import jax
import torch
import transformers
from rows import OURS, Row, take_turns

from jaxcrit.models.checkpoint import load, open_checkpoint
from jaxcrit.parallel.mesh import make_mesh


def rows(checkpoint: Path) -> list[Row]:
    """The checkpoint, from the system's cache of files."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    mesh = make_mesh()
    calls = {
        OURS: lambda: jax.tree.leaves(load(open_checkpoint(checkpoint), dtype="float32", mesh=mesh)),
        "transformers": lambda: transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
    }
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    return [Row("load", take_turns(calls), facts={"MB": size / 1e6})]
