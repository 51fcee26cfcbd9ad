"""``jaxcrit substitute``: what the tuned model loses when layers are taken from the model it was tuned from."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcrit import __version__
from jaxcrit.commands.substitute import SubstituteOptions
from jaxcrit.core import processes
from jaxcrit.core.deletions import write_deletions
from jaxcrit.core.errors import UserError, did_you_mean, listed
from jaxcrit.core.files import as_path, read_json, read_npz, write_npz
from jaxcrit.core.hashing import sha256_json
from jaxcrit.core.layers import LayerScores, LayerSpec, resolve, write_scores
from jaxcrit.core.rundir import RUN_FORMAT, RunDirectory
from jaxcrit.criteria.substitution import (
    SITES,
    Layers,
    host_variant,
    join,
    random_sets,
    variants,
    windows,
)
from jaxcrit.data.templates import Example, template_hash
from jaxcrit.evidence.rows import forget_partial, read_back, read_rows, sample_losses
from jaxcrit.evidence.sample_scores import SampleLosses, mean
from jaxcrit.evidence.variants import Batch, planned_evaluations, sweep
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.model import Bars, Session, open_session
from jaxcrit.studies.analysis import versions

# Of ModelConfig: says nothing about what the blocks compute.
_FREE = ("family", "max_length", "bos_token_id", "eos_token_ids", "hf_json")
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


def run_substitution(config: SubstituteOptions, *, progress: Bars | None = None) -> Substitution:
    """Runs ``jaxcrit substitute``; goes on where an earlier, interrupted run of the same configuration stopped.

    Args:
        config: what is asked.
        progress: makes progress bars (tqdm's signature), or None for silence.

    Returns:
        The finished run; pictures and pages are the reporting room's.

    Raises:
        UserError: any mistake in flags, checkpoints or data; then nothing is left in the run directory.
    """
    if config.sites not in SITES:
        raise UserError(f"--sites={config.sites}: expected {listed(SITES)}{did_you_mean(config.sites, SITES)}")
    if not config.tuned:
        raise UserError("--tuned: expected the tuned model, a checkpoint directory or a run of jaxcrit finetune")
    base = open_session(config.base, mesh=config.mesh, dtype=config.dtype)
    tuned = open_session(config.tuned, mesh=base.mesh, dtype=config.dtype)
    check_pair(base, tuned)
    plan = _plan(config, tuned)
    examples = read_rows(config, tuned)
    determines = _determines(config, base, tuned, plan, examples)
    directory = RunDirectory.open(_out(config, tuned, determines), determines)
    earlier = processes.share(lambda: read_json(directory.path / "run.json", RUN_FORMAT) if directory.resumed else {})
    if earlier.get("status") == "complete":
        return _finished(config, earlier, directory.path)
    run = _run_record(config, base, tuned, examples, determines)
    directory.begin(run)
    began = time.perf_counter()
    try:
        losses, tokens, counts = _losses(config, base, tuned, plan, examples, directory, progress)
    except UserError:
        directory.discard()
        raise
    result = _result(plan, losses, tokens, reverse=config.reverse) | {
        "block_evaluations": counts, "seconds": round(time.perf_counter() - began, 3)
    }  # fmt: skip
    _write_losses(directory.path, plan, tuned.config.num_layers, losses, tokens, examples)
    samples, scores = None, {}
    if plan.centres:
        samples = _samples(plan, losses, tokens)
        scores = samples.scores(config.score, tuned.config.num_layers, {
            "model_type": tuned.config.family, "model_hash": base.model_hash, "tuned_hash": tuned.model_hash,
            "window": config.window, "sites": config.sites, "reverse": config.reverse,
        }, "low" if config.reverse else "high")  # fmt: skip
        write_scores(directory.path / "scores.json", scores)
        left = {key: samples.without_each(tuned.config.num_layers, per_token=key.endswith("_per_token"))
                for key in scores}  # fmt: skip
        write_deletions(directory.path, left, [example.sample_id for example in examples])
    warnings = _warnings(result, base, tuned)
    run |= {"result": result, "warnings": warnings}
    directory.finish(run)
    forget_partial(directory.path)
    return Substitution(config, run, scores, samples, warnings, directory.path)


def check_pair(base: Session, tuned: Session) -> None:
    """Checks that one model can be tuned from the other.

    Raises:
        UserError: their shapes, their arithmetic or their vocabularies differ.
    """
    names = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in _FREE]
    differ = [
        f"{name} {getattr(base.config, name)} in the base, {getattr(tuned.config, name)} in the tuned model"
        for name in names
        if getattr(base.config, name) != getattr(tuned.config, name)
    ]
    where = f"--base={base.checkpoint.path} --tuned={tuned.checkpoint.path}"
    if differ:
        raise UserError(f"{where}: expected models of one shape, got {'; '.join(differ)}; give the very base")
    ours, theirs = base.tokenizer.get_vocab(), tuned.tokenizer.get_vocab()
    if ours != theirs:
        other = next(token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token))
        raise UserError(
            f"{where}: expected one tokenizer, got two; token {other!r} is {ours.get(other, 'absent')} in the base and"
            f" {theirs.get(other, 'absent')} in the tuned model"
        )


def _plan(config: SubstituteOptions, tuned: Session) -> _Plan:
    depth = tuned.config.num_layers
    if config.random < 0:
        raise UserError(f"--random={config.random}: expected 0 or more")
    if config.sets:
        sets = tuple(_set(text, tuned) for text in config.sets.split(";"))
        centres: tuple[int, ...] = ()
    else:
        found = windows(depth, config.window)
        centres, sets = tuple(found), tuple(found.values())
    sizes = sorted({len(layers) for layers in sets})
    random = [one for size in sizes for one in random_sets(depth, size, config.random, config.seed)]
    return _Plan(centres, sets, tuple(random))


def _set(text: str, tuned: Session) -> Layers:
    try:
        spec = LayerSpec.parse(text)
        if spec.needs_scores:
            raise UserError(f"--sets={text}: needs scores; give the layers.json of an analysis, as @DIR/layers.json")
        return resolve(spec, tuned.config.num_layers).layers
    except UserError as error:
        raise UserError(str(error).replace("--layers=", "--sets=")) from None


def _losses(
    config: SubstituteOptions, base: Session, tuned: Session, plan: _Plan, examples: Sequence[Example],
    directory: RunDirectory, progress: Bars | None,
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


def _warnings(result: Mapping[str, Any], base: Session, tuned: Session) -> list[str]:
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


def _determines(
    config: SubstituteOptions, base: Session, tuned: Session, plan: _Plan, examples: Sequence[Example]
) -> dict[str, Any]:
    """Everything that the results depend on; two runs that agree in it may share a directory."""
    asked = {key: value for key, value in dataclasses.asdict(config).items() if key not in _ELSEWHERE}
    return {
        "command": "substitute",
        "config": {**asked, "sets": [list(layers) for layers in plan.sets], "dtype": tuned.dtype},
        "base_hash": base.model_hash,
        "tuned_hash": tuned.model_hash,
        "template_hash": template_hash(tuned.tokenizer, config.template, config.edition),
        "data": sha256_json([example.sample_id for example in examples]),
        "jaxcrit": __version__,
    }


def _run_record(
    config: SubstituteOptions, base: Session, tuned: Session, examples: Sequence[Example],
    determines: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    return {
        "command": "substitute",
        "config": dataclasses.asdict(config),
        "seed": config.seed,
        "determines": dict(determines),
        "models": {"base": base.model_hash, "tuned": tuned.model_hash, "family": tuned.config.family,
                   "num_layers": tuned.config.num_layers, "width": tuned.config.width},
        "data": {"source": config.data or "demo", "num_samples": len(examples)},
        "attention": tuned.attention(),
        "versions": versions(),
    }  # fmt: skip


def _out(config: SubstituteOptions, tuned: Session, determines: Mapping[str, Any]) -> Path:
    if config.out:
        return as_path(config.out)
    name = (tuned.tuned[-1].run if tuned.tuned else tuned.checkpoint.path.resolve()).name
    return Path("jaxcrit-runs") / f"substitute-{name}-{sha256_json(dict(determines))[:8]}"
