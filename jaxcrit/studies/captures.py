"""Grams of every dataset of an analysis: from the run's fingerprint, else from forward passes of the model."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxcrit.capture import Activations, Position, capture, compiled_steps
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import atomic_path, read_npz, write_npz
from jaxcrit.core.rundir import RunDirectory
from jaxcrit.data.batches import choose_buckets, make_batches
from jaxcrit.data.templates import Example, template_hash
from jaxcrit.models.decoder import Decoder
from jaxcrit.similarity.grams import Kernel, centred_grams, pack_upper, unpack_upper
from jaxcrit.similarity.measures import unit_rows
from jaxcrit.studies.session import Bars, Session

FINGERPRINT_SAMPLES = 4096  # above it the Grams outgrow what one wants in a run directory
GRAM_BYTES = 8 * 2**30


@dataclasses.dataclass(frozen=True)
class AnalysisConfig:
    """What ``jaxcrit analyze`` is asked; every field is a flag of the same name.

    Attributes:
        model: checkpoint directory or hub id; empty for the embedded model.
        data: JSONL files and datasets of the paper with commas; empty for the embedded prompts.
        split: of the paper's datasets; empty for ``test``.
        out: run directory; empty for one named after the inputs.
        template: auto, none, chat, or a family of the paper.
        edition: clean or paper.
        position: last, mean or all.
        embed: save the embedding output too.
        save_activations: keep the hidden states.
        batch_size: prompts per forward pass.
        dtype: of weights and compute; empty for the session's default.
        precision: of matrix products.
        mesh: devices by axis.
        normalize: ``row`` to give every sample's activations unit length; empty to leave them as they are.
        kernel: linear or rbf.
        window: layers that delta averages over.
        include_self: whether a layer is in its own window.
        measures: of `jaxcrit.similarity.measures.MEASURES`, with commas, beside CKA.
        layers: LayerSpec of the selection.
        bias: which delta selects, debiased or biased.
        trim: layers at each end that are never critical.
        limit: first rows of each dataset only; 0 for all.
        shuffle_seed: of the order of the rows, before the limit; -1 for the order of the file.
        truncate: ``left``, ``right`` or ``paper`` to cut prompts that are too long.
        seed: of everything random.
    """

    model: str = ""
    data: str = ""
    split: str = ""
    out: str = ""
    template: str = "auto"
    edition: str = "clean"
    position: Position = "last"
    embed: bool = False
    save_activations: bool = False
    batch_size: int = 8
    dtype: str = ""
    precision: str = "highest"
    mesh: str = ""
    normalize: str = ""
    kernel: Kernel = "linear"
    window: int = 5
    include_self: bool = True
    measures: str = ""
    layers: str = "critical"
    bias: str = "debiased"
    trim: int = 2
    limit: int = 0
    shuffle_seed: int = -1
    truncate: str = ""
    seed: int = 0

    @property
    def criterion(self) -> str:
        """Score key that selects."""
        return "delta" if self.bias == "biased" else "delta_debiased"


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """One dataset, rendered.

    Attributes:
        name: unique within a run.
        source: path, or ``demo:FAMILY``.
        examples: in the order of the file.
    """

    name: str
    source: str
    examples: list[Example]

    @property
    def sample_ids(self) -> list[str]:
        """Identity of each prompt."""
        return [example.sample_id for example in self.examples]


class Captures:
    """Grams of each dataset: from the run's fingerprint where one fits, else from forward passes of the model.

    The weights are read when the first dataset needs them, and the buckets are common to all datasets, so
    that a bucket compiles once for all.
    """

    def __init__(
        self,
        config: AnalysisConfig,
        session: Session,
        datasets: Sequence[Dataset],
        directory: RunDirectory,
        progress: Bars | None,
    ):
        self.config, self.session, self.directory, self.progress = config, session, directory, progress
        self.alone = len(datasets) == 1
        self.decoder: Decoder | None = None
        self.taken: dict[str, dict[str, Any]] = {}
        self.began = time.time()
        lengths = [example.prompt_length for dataset in datasets for example in dataset.examples]
        split = session.mesh.shape["data"] * session.mesh.shape["fsdp"]
        self.batch_size = -(-config.batch_size // split) * split
        self.buckets = choose_buckets(lengths, self.batch_size, session.config.max_length)

    def folder(self, dataset: Dataset) -> Path:
        return self.directory.path if self.alone else self.directory.path / dataset.name

    def grams(self, dataset: Dataset) -> np.ndarray | jax.Array:
        folder = self.folder(dataset)
        file = folder / "fingerprint.npz"
        kept = not self.config.save_activations or (folder / "activations.safetensors").exists()
        if self.directory.resumed and file.exists() and kept:
            arrays, meta = read_npz(file)
            if meta.get("identity") == self.directory.identity:
                self.taken[dataset.name] = {"reused": True}
                return unpack_upper(arrays["gram"])
        prompts = dataset.examples
        count = sum(p.prompt_length for p in prompts) if self.config.position == "all" else len(prompts)
        needed = self.session.config.num_layers * count**2 * 4
        if needed > GRAM_BYTES:
            raise UserError(
                f"{dataset.name}: {count} samples need {needed / 2**30:.0f} GiB of Grams, at most"
                f" {GRAM_BYTES / 2**30:.0f} are taken; give fewer prompts with --limit"
            )
        activations = self._capture(dataset)
        hidden = unit_rows(activations.hidden) if self.config.normalize == "row" else activations.hidden
        grams: np.ndarray | jax.Array = centred_grams(
            hidden, self.config.kernel, allow_repeats=self.config.position == "all"
        )
        folder.mkdir(parents=True, exist_ok=True)
        if count <= FINGERPRINT_SAMPLES:
            packed = pack_upper(grams)
            meta = {
                "format": "jaxcrit.fingerprint",
                "format_version": 1,
                "identity": self.directory.identity,
                "model_hash": self.session.model_hash,
                "template_hash": template_hash(self.session.tokenizer, self.config.template, self.config.edition),
                "position": self.config.position,
                "kernel": self.config.kernel,
                "normalize": self.config.normalize,
                "num_layers": self.session.config.num_layers,
            }
            ids = np.array(dataset.sample_ids)[activations.units]
            write_npz(file, {"gram": packed, "sample_ids": ids, "units": activations.units}, meta)
            grams = unpack_upper(packed)  # so that a resumed run computes from the same bits
        if self.config.save_activations:
            arrays = {"hidden": np.asarray(activations.hidden)}
            if activations.embed is not None:
                arrays["embed"] = np.asarray(activations.embed)
            with atomic_path(folder / "activations.safetensors") as temporary:
                save_file(arrays, temporary)
        return grams

    def _capture(self, dataset: Dataset) -> Activations:
        if self.decoder is None:
            self.decoder = self.session.decoder(self.progress)
        config, mesh = self.config, self.session.mesh
        batches = make_batches(
            dataset.examples,
            self.batch_size,
            buckets=self.buckets,
            max_length=self.session.config.max_length,
        )
        bar = None if self.progress is None else self.progress(total=len(dataset.examples), desc=dataset.name)
        activations = capture(
            self.decoder,
            batches,
            len(dataset.examples),
            mesh=mesh,
            position=config.position,
            with_embed=config.embed,
            precision=config.precision,
            progress=None if bar is None else lambda done, _: bar.update(done - bar.n),
        )
        if bar is not None:
            bar.close()
        self.taken[dataset.name] = {
            "seconds": round(activations.seconds, 3),
            "prompts_per_second": round(len(dataset.examples) / activations.seconds, 2),
            "tokens": activations.num_tokens,
            "padded_tokens": activations.padded_tokens,
            "buckets": activations.num_buckets,
        }
        return activations

    def times(self) -> dict[str, Any]:
        return {
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.began)),
            "seconds": round(time.time() - self.began, 3),
            "compiled_forward_passes": compiled_steps(),
            "capture": self.taken,
        }
