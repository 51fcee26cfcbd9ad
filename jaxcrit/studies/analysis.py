"""The main job: from a checkpoint and prompts to layer scores, critical layers, and how sure they are."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxcrit import __version__
from jaxcrit.capture import POSITIONS, Activations, capture, compiled_steps
from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.files import atomic_path, read_npz, write_npz
from jaxcrit.core.hashing import sha256_json
from jaxcrit.core.layers import LayerScores, LayerSet, LayerSpec, resolve, write_scores
from jaxcrit.core.rundir import RunDirectory
from jaxcrit.criticality.cautions import cautions
from jaxcrit.criticality.score import layer_scores, values_without_each
from jaxcrit.criticality.selection import mean_rank, selection_probability
from jaxcrit.data.batches import choose_buckets, make_batches, refuse_long
from jaxcrit.data.datasets import load
from jaxcrit.data.templates import Example, render, template_hash
from jaxcrit.models.decoder import Decoder
from jaxcrit.similarity.cka import from_tables
from jaxcrit.similarity.grams import centred_grams, gram_tables, pack_upper, unpack_upper
from jaxcrit.similarity.inference import null_mean, participation_ratio
from jaxcrit.studies.session import Bars, Session, open_session

FINGERPRINT_SAMPLES = 4096  # above it the Grams outgrow what one wants in a run directory
_GRAM_BYTES = 8 * 2**30
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers", "safetensors")


@dataclasses.dataclass(frozen=True)
class AnalysisConfig:
    """What ``jaxcrit analyze`` is asked; every field is a flag of the same name.

    Attributes:
        model: checkpoint directory or hub id; empty for the embedded model.
        data: JSONL files with commas; empty for the embedded prompts.
        out: run directory; empty for one named after the inputs.
        template: auto, none or chat.
        position: last, mean or all.
        embed: save the embedding output too.
        save_activations: keep the hidden states.
        batch_size: prompts per forward pass.
        dtype: of weights and compute; empty for the session's default.
        precision: of matrix products.
        mesh: devices by axis.
        kernel: linear or rbf.
        window: layers that delta averages over.
        include_self: whether a layer is in its own window.
        layers: LayerSpec of the selection.
        bias: which delta selects, debiased or biased.
        trim: layers at each end that are never critical.
        limit: first rows of each dataset only; 0 for all.
        truncate: ``left`` to cut prompts that are too long.
        seed: of everything random.
    """

    model: str = ""
    data: str = ""
    out: str = ""
    template: str = "auto"
    position: str = "last"
    embed: bool = False
    save_activations: bool = False
    batch_size: int = 8
    dtype: str = ""
    precision: str = "highest"
    mesh: str = ""
    kernel: str = "linear"
    window: int = 5
    include_self: bool = True
    layers: str = "critical"
    bias: str = "debiased"
    trim: int = 2
    limit: int = 0
    truncate: str = ""
    seed: int = 0

    @property
    def criterion(self) -> str:
        """Score key that selects."""
        return "delta" if self.bias == "biased" else "delta_debiased"


@dataclasses.dataclass(frozen=True, eq=False)
class DatasetResult:
    """What one dataset says.

    Attributes:
        name: of the dataset.
        num_samples: N.
        scores: by score key.
        cka: ``biased``, ``debiased`` and ``null`` (what unrelated layers would score by the biased one), ``[L, L]``.
        chosen: layers this dataset alone would choose.
        selection_probability: ``[L]``, in how many bootstrap draws a layer is chosen; None for fixed layers.
        participation_ratio: ``[L]``, how many directions carry a layer.
        warnings: what would mislead a reader.
        without_each: ``[N, L]`` the selecting score with each sample left out.
    """

    name: str
    num_samples: int
    scores: dict[str, LayerScores]
    cka: dict[str, np.ndarray]
    chosen: LayerSet
    selection_probability: np.ndarray | None
    participation_ratio: np.ndarray
    warnings: list[str]
    without_each: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """A finished run.

    Attributes:
        config: what was asked.
        run: what ``run.json`` holds.
        datasets: by name, in the order given.
        scores: by score key: the dataset's own, or mean ranks over several.
        chosen: the layers.
        selection_probability: ``[L]`` of the choice over all datasets, or None.
        out: run directory.
    """

    config: AnalysisConfig
    run: dict[str, Any]
    datasets: dict[str, DatasetResult]
    scores: dict[str, LayerScores]
    chosen: LayerSet
    selection_probability: np.ndarray | None
    out: Path

    @property
    def consensus(self) -> LayerScores | None:
        """Mean ranks over several datasets by the score that selects; None for one dataset."""
        return self.scores[self.config.criterion] if len(self.datasets) > 1 else None


@dataclasses.dataclass(frozen=True, eq=False)
class _Dataset:
    name: str
    source: str
    examples: list[Example]

    @property
    def sample_ids(self) -> list[str]:
        return [example.sample_id for example in self.examples]


def run_analysis(config: AnalysisConfig, *, progress: Bars | None = None) -> Analysis:
    """Runs ``jaxcrit analyze``: captures, scores, selects, and writes the run directory's data files.

    Args:
        config: what is asked.
        progress: makes progress bars (tqdm's signature), or None for silence.

    Returns:
        The finished analysis; pictures and pages are the reporting room's.

    Raises:
        UserError: any mistake in flags, checkpoint or data; then nothing is left in the run directory.
    """
    spec = _check(config)
    session = open_session(config.model, mesh=config.mesh, dtype=config.dtype)
    if not spec.needs_scores:
        resolve(spec, session.config.num_layers, model_hash=session.model_hash)
    datasets = _datasets(config, session)
    determines = _determines(config, session, datasets)
    directory = RunDirectory.open(_out(config, session, determines), determines)
    run = _run_record(config, session, datasets, determines)
    directory.begin(run)
    try:
        captures = _Captures(config, session, datasets, directory, progress)
        results = {
            dataset.name: _score(config, session, spec, dataset, captures.grams(dataset)) for dataset in datasets
        }
        analysis = _combine(config, session, spec, results, directory.path)
        _write(analysis)
    except UserError:
        directory.discard()
        raise
    run |= {"chosen": list(analysis.chosen.layers), "warnings": {n: r.warnings for n, r in results.items()}}
    directory.finish({**run, "time": captures.times()})
    return dataclasses.replace(analysis, run={**analysis.run, **run, "time": captures.times()})


def _check(config: AnalysisConfig) -> LayerSpec:
    if config.position not in POSITIONS:
        raise UserError(f"--position={config.position}: expected {listed(POSITIONS)}")
    if config.window < 3 or config.window % 2 == 0:
        raise UserError(f"--window={config.window}: expected an odd number of at least 3 (the layer and its neighbours)")
    if config.bias not in ("biased", "debiased"):
        raise UserError(f"--bias={config.bias}: expected biased or debiased")
    if config.truncate not in ("", "left"):
        raise UserError(f"--truncate={config.truncate}: expected left")
    if config.batch_size < 1:
        raise UserError(f"--batch_size={config.batch_size}: expected at least 1")
    if config.embed and not config.save_activations:
        raise UserError("--embed adds the embedding output to what --save_activations keeps; give both")
    return LayerSpec.parse(config.layers)


def _datasets(config: AnalysisConfig, session: Session) -> list[_Dataset]:
    datasets = []
    for named in load(config.data, config.limit):
        examples = render(named.rows, session.tokenizer, config.template)
        if config.truncate != "left":
            refuse_long([example.prompt_length for example in examples], session.config.max_length, named.source)
        datasets.append(_Dataset(named.name, named.source, examples))
    return datasets


def _determines(config: AnalysisConfig, session: Session, datasets: Sequence[_Dataset]) -> dict[str, Any]:
    """Everything that the results depend on; two runs that agree in it may share a directory."""
    asked = dataclasses.asdict(config)
    for name in ("model", "data", "out", "batch_size", "mesh", "limit"):  # identity is in the hashes, not the paths
        del asked[name]
    return {
        "command": "analyze",
        "config": {**asked, "dtype": session.dtype},
        "model_hash": session.model_hash,
        "template_hash": template_hash(session.tokenizer, config.template),
        "data": {dataset.name: sha256_json(dataset.sample_ids) for dataset in datasets},
        "jaxcrit": __version__,
    }


def _run_record(
    config: AnalysisConfig, session: Session, datasets: Sequence[_Dataset], determines: Mapping[str, Any]
) -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "command": "analyze",
        "config": dataclasses.asdict(config),
        "seed": config.seed,
        "determines": dict(determines),
        "model": {
            "path": str(config.model or "embedded"),
            "hash": session.model_hash,
            "family": session.config.family,
            "num_layers": session.config.num_layers,
            "width": session.config.width,
            "dtype": session.dtype,
        },
        "template": {"mode": config.template, "hash": determines["template_hash"]},
        "data": {
            dataset.name: {
                "source": dataset.source,
                "num_prompts": len(dataset.examples),
                "longest_prompt": max(example.prompt_length for example in dataset.examples),
                "hash": determines["data"][dataset.name],
            }
            for dataset in datasets
        },
        "versions": {
            "jaxcrit": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _PACKAGES},
        },
        "devices": {"kind": device.device_kind, "platform": device.platform, "mesh": dict(session.mesh.shape)},
    }


def _out(config: AnalysisConfig, session: Session, determines: Mapping[str, Any]) -> Path:
    if config.out:
        return Path(config.out)
    name = session.checkpoint.path.resolve().name if config.model else "embedded"
    return Path("jaxcrit-runs") / f"analyze-{name}-{sha256_json(dict(determines))[:8]}"


class _Captures:
    """Grams of each dataset: from the run's fingerprint where one fits, else from forward passes of the model.

    The weights are read when the first dataset needs them, and the buckets are common to all datasets, so
    that a bucket compiles once for all.
    """

    def __init__(
        self,
        config: AnalysisConfig,
        session: Session,
        datasets: Sequence[_Dataset],
        directory: RunDirectory,
        progress: Bars | None,
    ):
        self.config, self.session, self.directory, self.progress = config, session, directory, progress
        self.alone = len(datasets) == 1
        self.decoder: Decoder | None = None
        self.taken: dict[str, dict[str, Any]] = {}
        self.began = time.time()
        lengths = [example.prompt_length for dataset in datasets for example in dataset.examples]
        if config.truncate == "left":
            lengths = [min(length, session.config.max_length) for length in lengths]
        split = session.mesh.shape["data"] * session.mesh.shape["fsdp"]
        self.batch_size = -(-config.batch_size // split) * split
        self.buckets = choose_buckets(lengths, self.batch_size, session.config.max_length)

    def folder(self, dataset: _Dataset) -> Path:
        return self.directory.path if self.alone else self.directory.path / dataset.name

    def grams(self, dataset: _Dataset) -> np.ndarray | jax.Array:
        folder = self.folder(dataset)
        file = folder / "fingerprint.npz"
        kept = not self.config.save_activations or (folder / "activations.safetensors").exists()
        if self.directory.resumed and file.exists() and kept:
            arrays, meta = read_npz(file)
            if meta.get("identity") == self.directory.identity:
                self.taken[dataset.name] = {"reused": True}
                return unpack_upper(arrays["gram"])
        activations = self._capture(dataset)
        count = activations.hidden.shape[1]
        needed = self.session.config.num_layers * count**2 * 4
        if needed > _GRAM_BYTES:
            raise UserError(
                f"{dataset.name}: {count} samples need {needed / 2**30:.0f} GiB of Grams, at most"
                f" {_GRAM_BYTES / 2**30:.0f} are taken; give fewer prompts with --limit"
            )
        grams = centred_grams(activations.hidden, self.config.kernel)
        folder.mkdir(parents=True, exist_ok=True)
        if count <= FINGERPRINT_SAMPLES:
            packed = pack_upper(grams)
            meta = {
                "format": "jaxcrit.fingerprint",
                "format_version": 1,
                "identity": self.directory.identity,
                "model_hash": self.session.model_hash,
                "template_hash": template_hash(self.session.tokenizer, self.config.template),
                "position": self.config.position,
                "kernel": self.config.kernel,
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

    def _capture(self, dataset: _Dataset) -> Activations:
        if self.decoder is None:
            self.decoder = self.session.decoder(self.progress)
        config, mesh = self.config, self.session.mesh
        batches = make_batches(
            dataset.examples,
            self.batch_size,
            buckets=self.buckets,
            max_length=self.session.config.max_length,
            truncate=config.truncate,
        )
        bar = None if self.progress is None else self.progress(total=len(dataset.examples), desc=dataset.name)
        activations = capture(
            self.decoder,
            batches,
            len(dataset.examples),
            mesh=mesh,
            position=config.position,  # type: ignore[arg-type]
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


def _score(
    config: AnalysisConfig, session: Session, spec: LayerSpec, dataset: _Dataset, grams: np.ndarray | jax.Array
) -> DatasetResult:
    tables = gram_tables(grams)
    meta = {
        "model_type": session.config.family,
        "model_hash": session.model_hash,
        "dataset": dataset.name,
        "position": config.position,
        "kernel": config.kernel,
    }
    scores = layer_scores(tables, window=config.window, include_self=config.include_self, meta=meta)
    left = values_without_each(tables, config.criterion, config.window, config.include_self)
    cka = {"biased": from_tables(tables), "debiased": from_tables(tables, "debiased"), "null": null_mean(tables)}
    return DatasetResult(
        name=dataset.name,
        num_samples=tables.num_samples,
        scores=scores,
        cka=cka,
        chosen=_choose(config, session, spec, scores[config.criterion]),
        selection_probability=_probability(config, spec, [scores[config.criterion]], [left]),
        participation_ratio=participation_ratio(tables),
        warnings=[],
        without_each=left,
    )


def _choose(config: AnalysisConfig, session: Session, spec: LayerSpec, scores: LayerScores) -> LayerSet:
    layers = session.config.num_layers
    return resolve(spec, layers, scores=scores, trim=config.trim, model_hash=session.model_hash)


def _probability(
    config: AnalysisConfig, spec: LayerSpec, scores: list[LayerScores], left: list[np.ndarray]
) -> np.ndarray | None:
    if spec.kind != "critical":
        return None
    return selection_probability(scores, left, spec.count, trim=config.trim, seed=config.seed)


def _combine(
    config: AnalysisConfig, session: Session, spec: LayerSpec, results: dict[str, DatasetResult], out: Path
) -> Analysis:
    everyone = list(results.values())
    scores = {key: mean_rank([result.scores[key] for result in everyone]) for key in everyone[0].scores}
    own = [result.scores[config.criterion] for result in everyone]
    probability = _probability(config, spec, own, [result.without_each for result in everyone])
    results = {
        name: dataclasses.replace(result, warnings=cautions(result.scores, result.cka["null"], result.chosen,
                                  result.selection_probability, trim=config.trim, dtype=session.dtype))
        for name, result in results.items()
    }  # fmt: skip
    chosen = _choose(config, session, spec, scores[config.criterion])
    return Analysis(config, {}, results, scores, chosen, probability, out)


def _write(analysis: Analysis) -> None:
    """Writes scores, CKA and layers: of each dataset, and, where there are several, of their consensus."""
    alone = len(analysis.datasets) == 1
    for name, result in analysis.datasets.items():
        folder = analysis.out if alone else analysis.out / name
        folder.mkdir(parents=True, exist_ok=True)
        write_scores(folder / "scores.json", result.scores)
        meta = {"format": "jaxcrit.cka", "format_version": 1, "dataset": name, "num_samples": result.num_samples}
        write_npz(folder / "cka.npz", {"biased": result.cka["biased"], "debiased": result.cka["debiased"]}, meta)
        result.chosen.save(folder / "layers.json")
    if not alone:
        write_scores(analysis.out / "scores.json", analysis.scores)
        analysis.chosen.save(analysis.out / "layers.json")
