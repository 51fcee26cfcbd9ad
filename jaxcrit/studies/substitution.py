"""``jaxcrit substitute``: what the tuned model loses when layers are taken from the model it was tuned from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcrit.commands.substitute import SubstituteOptions
from jaxcrit.core import processes
from jaxcrit.core.deletions import write_deletions
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_npz, write_npz
from jaxcrit.core.layers import LayerScores, LayerSpec, resolve, write_scores
from jaxcrit.core.run import running
from jaxcrit.core.rundir import RunDirectory
from jaxcrit.criteria.substitution import (
    Layers,
    host_variant,
    join,
    random_sets,
    variants,
    windows,
)
from jaxcrit.data.templates import Example, describe_template
from jaxcrit.evidence.rows import forget_partial, read_back, read_rows, sample_losses
from jaxcrit.evidence.sample_scores import SampleLosses, mean
from jaxcrit.evidence.variants import Batch, planned_evaluations, sweep
from jaxcrit.models.model import Bars, Model, check_pair, open_model

_ELSEWHERE = ("base", "tuned", "data", "split", "limit", "shuffle_seed", "out", "batch_size", "mesh")


@dataclasses.dataclass(frozen=True, eq=False)
class Substitution:
    """A finished run.

    Attributes:
        config: what was asked.
        run: what ``run.json`` holds; ``result`` has losses and counts.
        scores: `SubstituteOptions.score` (mean of per-sample means, the paper's) and the same ``_per_token``; none
            where sets were asked for.
        samples: losses of every sample under every window; None where sets were asked for.
        warnings: what would mislead a reader.
        out: run directory.
    """

    config: SubstituteOptions
    run: dict[str, Any]
    scores: dict[str, LayerScores]
    samples: SampleLosses | None
    warnings: list[str]
    out: Path

    @property
    def base_loss(self) -> float:
        """Of the base as it is, mean of per-sample means, nats."""
        return self.run["result"]["loss"]["base"]["samples"]

    @property
    def tuned_loss(self) -> float:
        """Of the tuned model as it is, mean of per-sample means, nats."""
        return self.run["result"]["loss"]["tuned"]["samples"]

    @property
    def block_evaluations(self) -> Mapping[str, Any]:
        """Counts: see docs/formats.md."""
        return self.run["result"]["block_evaluations"]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The sets of layers of a run; random ones behind the others."""

    centres: tuple[int, ...]
    sets: tuple[Layers, ...]
    random: tuple[Layers, ...]


def run_substitution(
    options: SubstituteOptions, *, progress: Bars | None = None, finish: Callable[[Substitution], Any] | None = None
) -> Substitution:
    """Runs ``jaxcrit substitute``; goes on where an earlier, interrupted run of the same configuration stopped.

    Args:
        options: what is asked.
        progress: maker of progress bars (tqdm's signature), or None for silence.
        finish: called with the result before the run counts as complete; it writes the report.

    Raises:
        UserError: any mistake in flags, checkpoints or data; then nothing is left in the run directory.
    """
    if not options.tuned:
        raise UserError("--tuned: expected the tuned model, a checkpoint directory or a run of jaxcrit finetune")
    base = open_model(options.base, mesh=options.mesh, dtype=options.dtype)
    tuned = open_model(options.tuned, mesh=base.mesh, dtype=options.dtype)
    check_pair(base, tuned)
    plan = _plan(options, tuned)
    datasets = read_rows(options, tuned)
    resolved = {"sets": [list(layers) for layers in plan.sets], "dtype": tuned.dtype}
    template = describe_template(tuned.tokenizer, options)
    models = {"model": tuned, "base": base}
    with running("substitute", options, models=models, datasets=datasets, template=template, resolved=resolved) as run:
        if run.complete:
            return _finished(options, dict(run.earlier), run.path)
        examples = [example for dataset in datasets for example in dataset.examples]
        losses, tokens, counts = _losses(options, base, tuned, plan, examples, run.directory, progress)
        result = _result(plan, losses, tokens, reverse=options.reverse) | {"block_evaluations": counts}
        _write_losses(run.path, plan, tuned.config.num_layers, losses, tokens, examples)
        samples, scores = None, {}
        if plan.centres:
            samples = _samples(plan, losses, tokens)
            scores = _scores(options, base, tuned, samples)
            write_scores(run.path / "scores.json", scores)
            left = {
                key: samples.without_each(tuned.config.num_layers, per_token=key.endswith("_per_token"))
                for key in scores
            }
            write_deletions(run.path, left, [example.sample_id for example in examples])
        warnings = _warnings(result, base, tuned)
        run.record |= {"result": result, "warnings": warnings}
        found = Substitution(options, run.record, scores, samples, warnings, run.path)
        if finish is not None:
            finish(found)
    forget_partial(found.out)
    return found


def _scores(options: SubstituteOptions, base: Model, tuned: Model, samples: SampleLosses) -> dict[str, LayerScores]:
    meta = {
        "model_type": tuned.config.family,
        "model_hash": base.model_hash,
        "tuned_hash": tuned.model_hash,
        "window": options.window,
        "sites": options.sites,
        "reverse": options.reverse,
    }
    return samples.scores(options.score, tuned.config.num_layers, meta, "low" if options.reverse else "high")


def _plan(config: SubstituteOptions, tuned: Model) -> _Plan:
    depth = tuned.config.num_layers
    if config.sets:
        sets = tuple(_set(text, tuned) for text in config.sets.split(";"))
        centres: tuple[int, ...] = ()
    else:
        found = windows(depth, config.window)
        centres, sets = tuple(found), tuple(found.values())
    sizes = sorted({len(layers) for layers in sets})
    random = [one for size in sizes for one in random_sets(depth, size, config.random, config.seed)]
    return _Plan(centres, sets, tuple(random))


def _set(text: str, tuned: Model) -> Layers:
    try:
        spec = LayerSpec.parse(text)
        if spec.needs_scores:
            raise UserError(f"--sets={text}: needs scores; give the layers.json of an analysis, as @DIR/layers.json")
        return resolve(spec, tuned.config.num_layers).layers
    except UserError as error:
        raise UserError(str(error).replace("--layers=", "--sets=")) from None


def _losses(
    config: SubstituteOptions, base: Model, tuned: Model, plan: _Plan, examples: Sequence[Example],
    directory: RunDirectory | None, progress: Bars | None,
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:  # fmt: skip
    """Losses ``[V, N]`` of the sets, the random sets, the host and the guest, in this order; tokens; counts."""
    depth = tuned.config.num_layers
    arrays = {"base": base.decoder(progress).weights(), "tuned": tuned.decoder(progress).weights()}
    kinds = {name: weights["embed"].dtype.name for name, weights in arrays.items()}
    if len(set(kinds.values())) > 1:
        raise UserError(f"the base is in {kinds['base']}, the tuned model in {kinds['tuned']}; give --dtype")
    blocks = join(tuned.config, arrays["base"], arrays["tuned"])
    host, guest = ("base", "tuned") if config.reverse else ("tuned", "base")
    as_it_is = {name: host_variant(depth, base=name == "base") for name in arrays}
    chosen, random = (
        variants(sets, depth, sites=config.sites, reverse=config.reverse) for sets in (plan.sets, plan.random)
    )
    chosen.append(as_it_is[host])
    sweeps = [(chosen, host), (random, host), ([as_it_is[guest]], guest)]
    sweeps = [(made, model) for made, model in sweeps if made]
    planned = sum(planned_evaluations(made, depth) for made, _ in sweeps)

    def take(batch: Batch, step: Callable[[int], None] | None) -> tuple[np.ndarray, np.ndarray]:
        found = [sweep(blocks, arrays[model], as_it_is[model], made, batch, progress=step) for made, model in sweeps]
        rows = [one.losses for one in found]
        # The host comes with the chosen sets; it belongs behind the random ones.
        return np.concatenate([rows[0][:-1], *rows[1:-1], rows[0][-1:], rows[-1]]), found[0].tokens

    losses, tokens, batches = sample_losses(
        examples, config.batch_size, tuned, directory, take, len(plan.sets) + len(plan.random) + 2, planned, progress
    )
    mine = planned_evaluations(chosen, depth)
    counts = {
        "sweep": mine,
        "forward_passes": mine / depth,
        "a_pass_each": len(chosen) * depth,
        "random": planned_evaluations(random, depth) if random else 0,
        "unsubstituted": depth,
        "batches": batches,
    }
    return losses, tokens, counts


def _samples(plan: _Plan, losses: np.ndarray, tokens: np.ndarray) -> SampleLosses:
    return SampleLosses(np.array(plan.centres), losses[: len(plan.sets)], losses[-2], tokens)


def _result(plan: _Plan, losses: np.ndarray, tokens: np.ndarray, *, reverse: bool) -> dict[str, Any]:
    """Losses of every model in both averages, and of every set the error of its difference from the host."""
    host, guest = losses[-2], losses[-1]
    names = ("base", "tuned") if reverse else ("tuned", "base")

    def averages(rows: np.ndarray) -> dict[str, Any]:
        return {"samples": mean(rows, np.ones(len(tokens))).tolist(), "tokens": mean(rows, tokens).tolist()}

    def entry(layers: Layers, row: np.ndarray) -> dict[str, Any]:
        error = float(np.std(row - host, ddof=1) / np.sqrt(len(row))) if len(row) > 1 else None
        return {"layers": list(layers), **averages(row), "stderr": error}

    everything = [entry(layers, row) for layers, row in zip((*plan.sets, *plan.random), losses, strict=False)]
    return {
        "loss": {name: averages(row) for name, row in zip(names, (host, guest), strict=True)},
        "centres": list(plan.centres),
        "sets": everything[: len(plan.sets)],
        "random": everything[len(plan.sets) :],
    }


def _write_losses(
    out: Path, plan: _Plan, num_layers: int, losses: np.ndarray, tokens: np.ndarray, examples: Sequence[Example]
) -> None:
    sets = (*plan.sets, *plan.random)
    members = np.zeros((len(sets), num_layers), bool)
    for row, layers in zip(members, sets, strict=True):
        row[list(layers)] = True
    arrays = {
        "members": members,
        "random": np.arange(len(sets)) >= len(plan.sets),
        "losses": losses[:-2],
        "host": losses[-2],
        "guest": losses[-1],
        "tokens": tokens,
        "sample_ids": np.array([example.sample_id for example in examples]),
    }
    write_npz(out / "substitution.npz", arrays, {"format": "jaxcrit.substitution", "format_version": 1})


def _finished(config: SubstituteOptions, run: dict[str, Any], out: Path) -> Substitution:
    """A run that is complete already, read back."""
    centres = run["result"]["centres"]
    if not centres:
        return Substitution(config, run, {}, None, run["warnings"], out)

    def look() -> dict[str, Any]:
        arrays, _ = read_npz(out / "substitution.npz")
        return {name: arrays[name].tolist() for name in ("losses", "host", "tokens")}

    kept = {name: np.array(values) for name, values in processes.share(look).items()}
    samples = SampleLosses(np.array(centres), kept["losses"][: len(centres)], kept["host"], kept["tokens"])
    return Substitution(config, run, read_back(out), samples, run["warnings"], out)


def _warnings(result: Mapping[str, Any], base: Model, tuned: Model) -> list[str]:
    found = []
    before, after = (result["loss"][name]["samples"] for name in ("base", "tuned"))
    if base.model_hash == tuned.model_hash:
        found.append("base and tuned model are the same: nothing was tuned")
    elif after >= before:
        found.append(
            f"the tuned model's loss on these rows is {after:.4f}, the base's {before:.4f}: there is no gain to"
            " trace to layers"
        )
    if tuned.dtype != "float32":
        found.append(f"the forward pass ran in {tuned.dtype or 'the dtype of the file'}: losses carry its rounding")
    return found
