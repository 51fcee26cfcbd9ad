"""What ``jaxcrit finetune`` is given: flags, checked; rows, rendered; layers, found; and what the results depend on."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import jax

from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import AnalyzeOptions, FinetuneOptions
from jaxcrit.core.layers import LayerScores, LayerSet, LayerSpec, resolve
from jaxcrit.data.published import PUBLISHED
from jaxcrit.data.rendering import render_sets
from jaxcrit.data.templates import Example
from jaxcrit.evidence.captures import Dataset
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.lora import make_lora
from jaxcrit.models.model import Bars, Model
from jaxcrit.models.partition import OUTSIDE, Partition, partition
from jaxcrit.parallel.mesh import parse_mesh
from jaxcrit.studies.analysis import run_analysis
from jaxcrit.training.data import check_rows, hold_out
from jaxcrit.training.optimizer import make_schedule

_ANALYSIS_PROMPTS = 300  # as many as the paper's


def check(config: FinetuneOptions) -> LayerSpec:
    """Checks the flags that need neither model nor data.

    Raises:
        UserError: naming the flag.
    """
    make_schedule(config.schedule, config.learning_rate, config.warmup + 1, config.warmup)
    parse_mesh(config.mesh)
    return LayerSpec.parse(config.layers)


def check_mesh(config: FinetuneOptions, session: Model) -> None:
    """Checks that a micro-batch divides over the mesh.

    Raises:
        UserError: it does not.
    """
    parts = session.mesh.shape["data"] * session.mesh.shape["fsdp"]
    if config.batch_size % parts:
        raise UserError(
            f"--batch_size={config.batch_size}: does not divide over the {parts} parts of the mesh (data x fsdp); take"
            f" a multiple of {parts}, or another --mesh"
        )


def compute_dtype(config: FinetuneOptions) -> str:
    """The dtype asked for; by default float32 on CPU, where bfloat16 is slower, and bfloat16 elsewhere."""
    return config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def resolve_fixed(config: FinetuneOptions, spec: LayerSpec, session: Model) -> LayerSet:
    """The layers of a rule that needs no scores, checked before anything is written.

    Raises:
        UserError: see `resolve` and `partition_of`.
    """
    chosen = resolve(spec, session.config.num_layers, model_hash=session.model_hash)
    partition_of(config, session.config, chosen)
    return chosen


def partition_of(config: FinetuneOptions, model: ModelConfig, chosen: LayerSet) -> Partition:
    """What trains: the chosen layers or all others, and what is outside the blocks.

    Raises:
        UserError: no layer is named, or none is left to train; see `partition`.
    """
    layers = chosen.layers if config.mode == "only" else chosen.complement()
    if not chosen.layers:
        raise UserError(f"--layers={config.layers}: names no layer")
    if not layers:
        raise UserError(
            f"--layers={config.layers} --mode=freeze: freezes all {chosen.num_layers} layers, and none is left to train"
        )
    asked = dict(zip(OUTSIDE, (config.train_embeddings, config.train_norms, config.train_head), strict=True))
    whole = config.mode == "freeze" and not config.lora_rank
    trains = {path for path, given in asked.items() if given or (given is None and whole)}
    lora = None
    if config.lora_rank:
        targets = [name.strip() for name in config.lora_targets.split(",") if name.strip()]
        lora = make_lora(model, config.lora_rank, config.lora_alpha, targets)
    return partition(model, layers, trains, rate_factors(config.layer_rates, chosen.num_layers), lora)


def rate_factors(text: str, num_layers: int) -> dict[int, float]:
    """Reads ``0-7:0.5,8-15:2``: layers, each with a factor on its learning rate; those that do not train may be named.

    Raises:
        UserError: not of that form, a layer named twice or outside the model, or a factor that is not above 0.
    """
    factors: dict[int, float] = {}
    for part in text.split(",") if text else []:
        span, _, factor = part.strip().rpartition(":")
        try:
            value = float(factor)
        except ValueError:
            value = 0.0
        if not re.fullmatch(r"\d+(-\d+)?", span) or not 0 < value < float("inf"):
            raise UserError(
                f"--layer_rates={text}: expected LAYERS:FACTOR such as 0-7:0.5, above 0, got {part.strip()!r}"
            )
        for layer in resolve(LayerSpec.parse(span), num_layers).layers:
            if layer in factors:
                raise UserError(f"--layer_rates={text}: expected each layer once, got {layer} twice")
            factors[layer] = value
    return factors


def read_examples(config: FinetuneOptions, session: Model) -> list[Dataset]:
    """Rows to train and to test on, ``train`` and ``eval``, rendered and checked.

    Raises:
        UserError: see `render_sets`, `check_rows` and `hold_out`.
    """
    most = min(config.max_length or session.config.max_length, session.config.max_length)

    def rendered(data: str, splits: str, limit: int) -> list[Example]:
        published = any(part.strip().partition(":")[0] in PUBLISHED for part in data.split(","))
        asked = dataclasses.replace(config, data=data, split=splits if published else config.split, limit=limit)
        found: list[Example] = []
        for one in render_sets(asked, session.tokenizer, most, training=True):
            longest = one.limit if config.truncate == "paper" else most
            check_rows(one.cut, longest, session.config.vocab_size, one.named.source)
            found += one.cut
        return found

    rows = rendered(config.data, config.split or "train", config.limit)
    source = config.data or "demo"
    if config.eval_data:
        tests = rendered(config.eval_data, config.eval_split or "test", 0)
        return [Dataset("train", source, rows), Dataset("eval", config.eval_data, tests)]
    rows, held = hold_out(rows, source)
    return [Dataset("train", source, rows), Dataset("eval", source, held)]


def critical_layers(
    config: FinetuneOptions, spec: LayerSpec, session: Model, out: Path, progress: Bars | None
) -> LayerSet:  # fmt: skip
    """The layers an analysis of the training prompts chooses; an analysis that is there already is used."""
    scores, trim = layer_scores(config, out, progress)
    return resolve(spec, session.config.num_layers, scores=scores, trim=trim, model_hash=session.model_hash)


def layer_scores(config: FinetuneOptions, out: Path, progress: Bars | None) -> tuple[LayerScores, int]:
    """What such an analysis ranks by, and how many layers it trims; the same whatever number of layers is asked for."""
    published = any(part.strip().partition(":")[0] in PUBLISHED for part in config.data.split(","))
    split_of = config.split or ("train" if published else "")
    analysis = AnalyzeOptions(
        model=config.model, data=config.data, split=split_of, limit=_ANALYSIS_PROMPTS,
        shuffle_seed=max(config.shuffle_seed, 0), out=config.analysis or str(out / "analysis"),
        template=config.template, edition=config.edition, truncate=config.truncate, mesh=config.mesh,
    )  # fmt: skip
    return run_analysis(analysis, progress=progress).scores[analysis.criterion], analysis.trim
