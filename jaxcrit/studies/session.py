"""What every command does first: the mesh, the model on it, its tokenizer and its identity."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxcrit.data.tokenizer import load_tokenizer
from jaxcrit.models.checkpoint import Checkpoint, load, locate, model_hash, open_checkpoint
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Decoder
from jaxcrit.parallel.mesh import make_mesh, parse_mesh

EMBEDDED_MODEL = Path(__file__).parents[1] / "assets" / "demo_model"
Bars = Callable[..., Any]  # makes a progress bar: called as tqdm with total= and desc=


@dataclasses.dataclass(frozen=True, eq=False)
class Session:
    """An opened model: headers checked, identity known, weights not yet read.

    Attributes:
        checkpoint: directory, config and tensor headers.
        tokenizer: the model's own (transformers).
        model_hash: identity of config and weights.
        mesh: devices.
        dtype: of weights and compute.
    """

    checkpoint: Checkpoint
    tokenizer: Any
    model_hash: str
    mesh: Mesh
    dtype: str

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.checkpoint.config

    def decoder(self, bars: Bars | None = None) -> Decoder:
        """Loads the weights onto the mesh."""
        if bars is None:
            return load(self.checkpoint, dtype=self.dtype, mesh=self.mesh)
        with bars(total=1, desc="weights", unit=" tensors") as bar:

            def progress(done: int, total: int, _: str) -> None:
                bar.total = total
                bar.update(done - bar.n)

            return load(self.checkpoint, dtype=self.dtype, mesh=self.mesh, progress=progress)


def open_session(model: str, *, mesh: str = "", dtype: str = "", bars: Bars | None = None) -> Session:
    """Opens a checkpoint directory, a hub id, or (with an empty name) the embedded model.

    Args:
        model: as above.
        mesh: such as ``data=4,fsdp=2``; default all devices on ``data``.
        dtype: default float32 on CPU, where bfloat16 is slower, and the file's own elsewhere.
        bars: makes progress bars.

    Raises:
        UserError: see `open_checkpoint`, `load_tokenizer`, `make_mesh`.
    """
    devices = make_mesh(parse_mesh(mesh))
    path = locate(model) if model else EMBEDDED_MODEL
    checkpoint = open_checkpoint(path)
    tokenizer = load_tokenizer(path)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "")
    return Session(checkpoint, tokenizer, model_hash(checkpoint), devices, dtype)
