"""One prompt with and without an intervention: components of a layer removed, or a mean difference of prompts added."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrit.core import processes
from jaxcrit.core.errors import UserError, did_you_mean, listed
from jaxcrit.core.files import write_json
from jaxcrit.core.layers import LayerSet
from jaxcrit.core.run import running
from jaxcrit.core.selections import LayerSpec, resolve
from jaxcrit.criteria.delta import CURVES, layer_scores
from jaxcrit.data.batches import make_batches
from jaxcrit.data.dataset import Dataset
from jaxcrit.data.templates import describe_template
from jaxcrit.evidence.capture import capture
from jaxcrit.models.decoder import Decoder, logits
from jaxcrit.models.generation import decode, prefill
from jaxcrit.models.interventions import Intervention, edit, intervention
from jaxcrit.models.model import Bars, Model, open_model
from jaxcrit.models.stops import stop_tokens
from jaxcrit.similarity import Components, centred_grams, gram_tables, principal_components
from jaxcrit.studies.options import InterveneOptions

MODES = ("paper", "project", "steer", "none")
INTERVENTION = "intervention.json"
_WORDS = 8  # that a component is read as, in each direction
_LIKELY = 3  # next tokens shown


@dataclasses.dataclass(frozen=True, eq=False)
class Intervened:
    """A finished run.

    Attributes:
        found: what ``intervention.json`` holds.
        warnings: what would mislead a reader.
        out: run directory.
    """

    found: dict[str, Any]
    warnings: list[str]
    out: Path


def run_intervene(config: InterveneOptions, *, progress: Bars | None = None) -> Intervened:
    """Runs ``jaxcrit intervene``.

    Args:
        config: what is asked.
        progress: makes progress bars (tqdm's signature), or None for silence.

    Raises:
        UserError: any mistake in flags, checkpoint or data; then nothing is left in the run directory.
    """
    components = _check(config)
    spec = LayerSpec.parse(config.layers)
    spec.check_key(CURVES)
    model = open_model(config.model, mesh=config.mesh, dtype=config.dtype)
    if not spec.needs_scores:
        resolve(spec, model.config.num_layers, model_hash=model.model_hash)
    stop = stop_tokens(config.stop, model, config.template)
    dataset = one_dataset(config, model, config.max_new_tokens)
    if not 0 <= config.prompt_index < len(dataset.examples):
        raise UserError(
            f"--prompt_index={config.prompt_index}: expected 0 to {len(dataset.examples) - 1}, the rows of"
            f" {dataset.source}"
        )
    steering = [
        one_dataset(dataclasses.replace(config, data=path, limit=0), model)
        for path in (config.steer_from, config.steer_to)
        if path
    ]
    datasets = [
        dataset,
        *(dataclasses.replace(one, name=f"steer:{one.name}:{place}") for place, one in enumerate(steering)),
    ]
    resolved = {"dtype": model.dtype, "stop": stop}
    template = describe_template(model.tokenizer, config)
    with running(
        "intervene", config, models={"model": model}, datasets=datasets, template=template, resolved=resolved
    ) as run:
        decoder = model.decoder(progress)
        hidden = states(decoder, dataset, model, progress)
        layers = critical_layers(spec, hidden, model)
        found, warnings = _measure(
            config, model, decoder, dataset, steering, hidden, layers, components, stop, progress
        )
        write_json(run.path / INTERVENTION, "jaxcrit.intervention", found)
        run.record["warnings"] = warnings
    return Intervened(found, warnings, run.path)


def parse_components(text: str, flag: str = "components") -> tuple[int, ...]:
    """Reads ``0,1,2``; empty for none.

    Raises:
        UserError: not of that form.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise UserError(f"--{flag}={text}: expected different whole numbers from 0, such as 0,1,2; empty for none")
    return tuple(sorted(map(int, parts)))


def one_dataset(config: Any, model: Model, reserve: int = 0) -> Dataset:
    """The only dataset of ``--data``.

    Raises:
        UserError: there are several; see `Model.read`.
    """
    datasets = model.read(config, reserve=reserve)
    if len(datasets) > 1:
        names = [dataset.source for dataset in datasets]
        raise UserError(f"--data={config.data}: components are of one dataset, got {listed(names)}; name one of them")
    return datasets[0]


def states(decoder: Decoder, dataset: Dataset, model: Model, progress: Bars | None) -> np.ndarray:
    """Last-token states ``[L, N, D]`` of all prompts, on the host."""
    batches = make_batches(dataset.examples, batch_rows(model, 16))
    bar = None if progress is None else progress(total=len(dataset.examples), desc=dataset.name)
    found = capture(
        decoder,
        batches,
        len(dataset.examples),
        mesh=model.mesh,
        progress=None if bar is None else lambda done, _: bar.update(done - bar.n),
    )
    if bar is not None:
        bar.close()
    return processes.whole(found.hidden)


def batch_rows(model: Model, asked: int) -> int:
    """Rows of a batch: as many as asked for, rounded up to what divides over the mesh."""
    split = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
    return -(-asked // split) * split


def critical_layers(spec: LayerSpec, hidden: np.ndarray, model: Model) -> LayerSet:
    """The layers of a rule; one that ranks goes by debiased δ over these very prompts, or by the score it names."""
    scores = layer_scores(gram_tables(centred_grams(hidden))) if spec.needs_scores else None
    return resolve(spec, model.config.num_layers, scores=scores, model_hash=model.model_hash)


def lens(decoder: Decoder, directions: np.ndarray, tokenizer: Any, count: int = _WORDS) -> list[dict[str, list[str]]]:
    """What directions ``[k, D]`` say: the tokens that final norm and head score highest for each, and for its negative.

    The sign of a component is a convention, so both ends are read (the logit lens, nostalgebraist 2020).
    """
    both = jnp.asarray(np.stack([directions, -directions], axis=1), jnp.float32)
    top = processes.whole(jax.lax.top_k(logits(decoder, both), count)[1])
    return [
        dict(zip("+-", [[tokenizer.decode([i]) for i in end] for end in ends.tolist()], strict=True)) for ends in top
    ]


@jax.jit
def divergence(scores: jax.Array, other: jax.Array) -> jax.Array:
    """KL(softmax(scores) || softmax(other)) in nats: ``[..., V]`` both, ``[...]``."""
    log_p, log_q = jax.nn.log_softmax(scores), jax.nn.log_softmax(other)
    return jnp.maximum(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), 0)  # rounding may take it below


def _check(config: InterveneOptions) -> tuple[int, ...]:
    if config.mode not in MODES:
        raise UserError(f"--mode={config.mode}: expected {listed(MODES)}{did_you_mean(config.mode, MODES)}")
    given = [bool(config.steer_from), bool(config.steer_to)]
    if config.mode == "steer" and not all(given):
        raise UserError("--mode=steer: expected --steer_from=FILE and --steer_to=FILE, rows of two kinds")
    if config.mode != "steer" and any(given):
        raise UserError(f"--mode={config.mode}: --steer_from and --steer_to go with --mode=steer")
    return parse_components(config.components)


def _measure(
    config: InterveneOptions,
    model: Model,
    decoder: Decoder,
    dataset: Dataset,
    steering: Sequence[Dataset],
    hidden: np.ndarray,
    layers: LayerSet,
    components: tuple[int, ...],
    stop: list[int],
    progress: Bars | None,
) -> tuple[dict[str, Any], list[str]]:
    example = dataset.examples[config.prompt_index]
    (batch,) = make_batches([example], batch_rows(model, 1))
    shape = (model.config.num_layers, len(batch.rows), model.config.width)
    found: dict[str, Any] = {
        "prompt": example.prompt,
        "prompt_index": config.prompt_index,
        "sample_id": example.sample_id,
        "mode": config.mode,
        "layers": list(layers.layers),
    }
    warnings: list[str] = []
    edits = intervention(shape)
    if config.mode == "steer":
        first, second = (states(decoder, one, model, progress).mean(axis=1) for one in steering)
        difference = config.strength * (second - first)
        edits = intervention(shape, shifts={layer: difference[layer] for layer in layers.layers})
        found |= {
            "strength": config.strength,
            "steer_from": steering[0].source,
            "steer_to": steering[1].source,
            "lens": {str(layer): lens(decoder, difference[layer][None], model.tokenizer) for layer in layers.layers},
        }
    elif components and config.mode != "none":
        fit = principal_components(hidden, max(components) + 1)
        warnings = fit.unidentified(components, layers.layers)
        edits = removal(fit, layers.layers, components, config.mode, shape, np.full(shape[1], config.prompt_index))
        found |= {
            "components": list(components),
            "of": described(fit, layers.layers, components),
            "lens": {
                str(layer): lens(decoder, fit.directions[layer][list(components)], model.tokenizer)
                for layer in layers.layers
            },
        }
    prompts = prefill(decoder, batch.tokens, batch.lengths, config.max_new_tokens, mesh=model.mesh)
    samples = np.where(batch.rows == 0, config.prompt_index, -1)
    scores = {}
    for name, data in (("before", intervention(shape, rank=edits.basis.shape[1])), ("after", edits)):
        answer = decode(decoder, prompts, stop=stop, samples=samples, edit=edit, edits=data)
        ids, scores[name] = answer.token_ids[0], processes.whole(answer.scores)[0]
        found[name] = {
            "text": model.tokenizer.decode(ids, skip_special_tokens=True),
            "token_ids": ids,
            "stopped": bool(answer.stopped[0]),
            "next_tokens": _likely(scores[name], model.tokenizer),
        }
    found["next_token_kl"] = float(divergence(scores["before"], scores["after"]))
    return found, warnings


def removal(
    fit: Components,
    layers: Sequence[int],
    components: Sequence[int],
    mode: str,
    shape: tuple[int, int, int],
    rows: np.ndarray,
) -> Intervention:
    """Takes components out of layers, in the way of a mode.

    Args:
        fit: the components.
        layers: edited, together.
        components: removed.
        mode: ``paper`` or ``project``, see `InterveneOptions`.
        shape: (L, B, D).
        rows: ``[B]`` which sample of the fit each row of the batch is.
    """
    rank = fit.directions.shape[1]
    if mode == "project":
        about = {layer: (fit.mean[layer], fit.directions[layer][list(components)]) for layer in layers}
        return intervention(shape, projections=about, rank=rank)
    part = fit.part(components)
    return intervention(shape, shifts={layer: -part[layer][rows] for layer in layers}, rank=rank)


def described(fit: Components, layers: Sequence[int], components: Sequence[int]) -> dict[str, Any]:
    """By layer, the share of the variance that each removed component has."""
    shares = fit.spectrum.explained_variance
    return {str(layer): [round(float(shares[layer, c]), 6) for c in components] for layer in layers}


def _likely(scores: np.ndarray, tokenizer: Any) -> list[list[Any]]:
    values, ids = jax.lax.top_k(jax.nn.softmax(scores), min(_LIKELY, len(scores)))
    return [[tokenizer.decode([i]), round(p, 6)] for i, p in zip(ids.tolist(), values.tolist(), strict=True)]
