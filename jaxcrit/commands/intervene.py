"""``jaxcrit intervene``: one prompt with components of a layer removed, or a mean difference of prompts added."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcrit.commands import shared
from jaxcrit.core import console
from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.groups import BY_HASH, MeshOptions, ModelOptions, OutOptions, RowOptions
from jaxcrit.core.layers import LayerSet
from jaxcrit.core.options import option
from jaxcrit.core.selections import LayerSpec, resolve
from jaxcrit.reporting.tables import shortened

if TYPE_CHECKING:
    from jaxcrit.data.dataset import Dataset
    from jaxcrit.models.decoder import Decoder
    from jaxcrit.models.interventions import Intervention
    from jaxcrit.models.model import Bars, Model
    from jaxcrit.similarity import Components

INTERVENTION = "intervention.json"
_WORDS = 8  # that a component is read as, in each direction
_LIKELY = 3  # next tokens shown
_NOTHING = 1e-3  # nats of the next token below which an intervention showed nothing
_ANSWERS = ("before", "after")
_WHAT = {
    "paper": "the prompt's part of components {} subtracted at every new token",
    "project": "components {} removed from every state",
    "steer": "{strength:g} x (mean of {steer_to} - mean of {steer_from}) added",
    "none": "nothing removed",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterveneOptions(ModelOptions, RowOptions, OutOptions, MeshOptions, title="intervention"):
    """What ``jaxcrit intervene`` is asked; one dataset."""

    data: str = option("demo:arithmetic", "prompts: JSONL, dolly:JSONL, ...", word="FILE", free=BY_HASH)
    layers: str = option("", "critical:K, 3-5,9, @FILE, all, ... (default: the middle one)", word="SPEC")
    components: str = option("0,1,2", "principal components to remove; empty for none", word="LIST")
    prompt_index: int = option(0, "row of the prompt to answer, from 0", lowest=0)
    mode: str = option("paper", "the prompt's part, the state's own, ...", tuple(_WHAT))
    steer_from: str = option("", "rows whose mean state is taken away (steer)", word="FILE", free=BY_HASH)
    steer_to: str = option("", "rows whose mean state is added (steer)", word="FILE", free=BY_HASH)
    strength: float = option(1.0, "factor of that difference")
    at: str = option("all", "new tokens it acts on: all, the first, or those after it", ("all", "first", "later"))
    max_new_tokens: int = option(64, "tokens of each answer, at most", lowest=1, group="generation")
    stop: str = option(
        "", "more tokens that end an answer, ids or texts, with commas", word="TOKENS", group="generation"
    )


OPTIONS = InterveneOptions


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


def run(options: InterveneOptions) -> int:
    """Answers one prompt with and without the intervention, and prints both."""
    from jaxcrit.core.progress import bars

    found = run_intervene(options, progress=bars)
    console.tell(text(found))
    shared.tell_next("intervene", options, found.out)
    return 0


def run_intervene(options: InterveneOptions, *, progress: Bars | None = None) -> Intervened:
    """Answers, and writes the run directory.

    Args:
        options: what is asked.
        progress: makes progress bars (tqdm's signature), or None for silence.

    Raises:
        UserError: any mistake in flags, checkpoint or data; then nothing is left in the run directory.
    """
    import jax

    from jaxcrit.core import processes
    from jaxcrit.core.files import write_json
    from jaxcrit.core.run import running
    from jaxcrit.criteria.delta import CURVES
    from jaxcrit.data.batches import make_batches
    from jaxcrit.evaluation.losses import divergence
    from jaxcrit.models.generation import decode, prefill
    from jaxcrit.models.interventions import edit, intervention
    from jaxcrit.models.model import open_model
    from jaxcrit.models.stops import stop_tokens
    from jaxcrit.similarity import principal_components

    given = [bool(options.steer_from), bool(options.steer_to)]
    if options.mode == "steer" and not all(given):
        raise UserError("--mode=steer: expected --steer_from=FILE and --steer_to=FILE, rows of two kinds")
    if options.mode != "steer" and any(given):
        raise UserError(f"--mode={options.mode}: --steer_from and --steer_to go with --mode=steer")
    components = parse_components(options.components)
    spec = LayerSpec.parse(options.layers) if options.layers else None
    if spec is not None:
        spec.check_key(CURVES)
    model = open_model(options.model, mesh=options.mesh, dtype=options.dtype)
    spec = spec or LayerSpec("list", layers=(model.config.num_layers // 2,))
    if not spec.needs_scores:
        resolve(spec, model.config.num_layers, model_hash=model.model_hash)
    stop = stop_tokens(options.stop, model, options.template)
    dataset = one_dataset(options, model, options.max_new_tokens)
    if options.prompt_index >= len(dataset.examples):
        raise UserError(
            f"--prompt_index={options.prompt_index}: expected 0 to {len(dataset.examples) - 1}, the rows of"
            f" {dataset.source}"
        )
    named = [path for path in (options.steer_from, options.steer_to) if path]
    steering = [one_dataset(dataclasses.replace(options, data=path, limit=0), model) for path in named]
    renamed = [dataclasses.replace(one, name=f"steer:{one.name}:{place}") for place, one in enumerate(steering)]
    datasets = [dataset, *renamed]
    with running("intervene", options, models={"model": model}, datasets=datasets, resolved={"stop": stop}) as run:
        decoder = model.decoder(progress)
        hidden = states(decoder, dataset, model, progress)
        layers = critical_layers(spec, hidden, model).layers
        prompt = dataset.examples[options.prompt_index]
        found: dict[str, Any] = {
            "prompt": prompt.prompt,
            "prompt_index": options.prompt_index,
            "sample_id": prompt.sample_id,
            "mode": options.mode,
            "layers": list(layers),
            "at": options.at,
        }
        (batch,) = make_batches([prompt], model.budget(1))
        shape, warnings = (model.config.num_layers, len(batch.rows), model.config.width), []
        edits = intervention(shape)
        if options.mode == "steer":
            first, second = (states(decoder, one, model, progress).mean(axis=1) for one in steering)
            difference = options.strength * (second - first)
            edits = intervention(shape, shifts={layer: difference[layer] for layer in layers})
            found |= {
                "strength": options.strength,
                "steer_from": steering[0].source,
                "steer_to": steering[1].source,
                "lens": {str(layer): lens(decoder, difference[layer][None], model.tokenizer) for layer in layers},
            }
        elif components and options.mode != "none":
            fit, chosen = principal_components(hidden, max(components) + 1), list(components)
            warnings = fit.unidentified(chosen, layers)
            edits = removal(fit, layers, components, options.mode, np.full(shape[1], options.prompt_index))
            words = {str(layer): lens(decoder, fit.directions[layer][chosen], model.tokenizer) for layer in layers}
            found |= {"components": chosen, "of": described(fit, layers, components), "lens": words}
        prompts = prefill(decoder, batch.tokens, batch.lengths, options.max_new_tokens, mesh=model.mesh)
        samples = np.where(batch.rows == 0, options.prompt_index, -1)
        scores = {}
        nothing = intervention(shape, rank=edits.basis.shape[1])
        changed = tuple(nothing if options.at == other else edits for other in ("later", "first"))
        for name, (first, later) in zip(_ANSWERS, ((nothing, nothing), changed), strict=True):
            answer = decode(decoder, prompts, stop=stop, samples=samples, edit=edit, edits=later, first=first)
            ids, scores[name] = answer.token_ids[0], processes.whole(answer.scores)[0]
            values, tokens = jax.lax.top_k(jax.nn.softmax(scores[name]), min(_LIKELY, len(scores[name])))
            likely = zip(tokens.tolist(), values.tolist(), strict=True)
            found[name] = {
                "text": model.tokenizer.decode(ids, skip_special_tokens=True),
                "token_ids": ids,
                "stopped": bool(answer.stopped[0]),
                "next_tokens": [[model.tokenizer.decode([token]), round(share, 6)] for token, share in likely],
            }
        found["next_token_kl"] = float(divergence(scores["before"], scores["after"]))
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


def one_dataset(options: Any, model: Model, reserve: int = 0) -> Dataset:
    """The only dataset of ``--data``.

    Raises:
        UserError: there are several; see `Model.read`.
    """
    datasets = model.read(options, reserve=reserve)
    if len(datasets) > 1:
        names = [dataset.source for dataset in datasets]
        raise UserError(f"--data={options.data}: components are of one dataset, got {listed(names)}; name one of them")
    return datasets[0]


def states(decoder: Decoder, dataset: Dataset, model: Model, progress: Bars | None) -> np.ndarray:
    """Last-token states ``[L, N, D]`` of all prompts, on the host."""
    from jaxcrit.core import processes
    from jaxcrit.core.progress import bar, moved
    from jaxcrit.data.batches import make_batches
    from jaxcrit.evidence.capture import capture

    batches, count = make_batches(dataset.examples, model.budget(16)), len(dataset.examples)
    with bar(progress, total=count, desc=dataset.name) as shown:
        found = capture(decoder, batches, count, mesh=model.mesh, progress=moved(shown))
    return processes.whole(found.hidden)


def critical_layers(spec: LayerSpec, hidden: np.ndarray, model: Model) -> LayerSet:
    """The layers of a rule; one that ranks goes by debiased δ over these very prompts, or by the score it names."""
    from jaxcrit.criteria.delta import layer_scores
    from jaxcrit.similarity import centred_grams, gram_tables

    scores = layer_scores(gram_tables(centred_grams(hidden))) if spec.needs_scores else None
    return resolve(spec, model.config.num_layers, scores=scores, model_hash=model.model_hash)


def lens(decoder: Decoder, directions: np.ndarray, tokenizer: Any, count: int = _WORDS) -> list[dict[str, list[str]]]:
    """What directions ``[k, D]`` say: the tokens that final norm and head score highest for each, and for its negative.

    The sign of a component is a convention, so both ends are read (the logit lens, nostalgebraist 2020).
    """
    import jax

    from jaxcrit.core import processes
    from jaxcrit.models.decoder import logits

    both = jax.numpy.asarray(np.stack([directions, -directions], axis=1), np.float32)
    top = processes.whole(jax.lax.top_k(logits(decoder, both), count)[1])
    return [
        dict(zip("+-", [[tokenizer.decode([i]) for i in end] for end in ends.tolist()], strict=True)) for ends in top
    ]


def removal(
    fit: Components, layers: Sequence[int], components: Sequence[int], mode: str, rows: np.ndarray
) -> Intervention:
    """Takes components out of layers, in the way of a mode.

    Args:
        fit: the components.
        layers: edited, together.
        components: removed.
        mode: ``paper`` or ``project``, see `InterveneOptions`.
        rows: ``[B]`` which sample of the fit each row of the batch is.
    """
    from jaxcrit.models.interventions import intervention

    depth, rank, width = fit.directions.shape
    shape = depth, len(rows), width
    if mode == "project":
        about = {layer: (fit.mean[layer], fit.directions[layer][list(components)]) for layer in layers}
        return intervention(shape, projections=about, rank=rank)
    part = fit.part(components)
    return intervention(shape, shifts={layer: -part[layer][rows] for layer in layers}, rank=rank)


def described(fit: Components, layers: Sequence[int], components: Sequence[int]) -> dict[str, Any]:
    """By layer, the share of the variance that each removed component has."""
    shares = fit.spectrum.explained_variance
    return {str(layer): [round(float(shares[layer, c]), 6) for c in components] for layer in layers}


def text(done: Intervened) -> str:
    """The case in lines; prompt and answers as they are."""
    found = done.found
    layers = ", ".join(map(str, found["layers"]))
    what = _WHAT[found["mode"]].format(", ".join(map(str, found.get("components", ()))) or "none", **found)
    lines = [f"warning: {text}" for text in done.warnings]
    at = {"all": "", "first": ", for the first new token alone", "later": ", after the first new token"}[found["at"]]
    lines += [f"prompt {found['prompt_index']}: {found['prompt']}", f"layers {layers}: {what}{at}", ""]
    lines += [f"{name:>6}: {found[name]['text']!r}{'' if found[name]['stopped'] else ' …'}" for name in _ANSWERS]
    lines += ["", f"next token: KL {max(found['next_token_kl'], 0):.3f} nats"]
    for name in _ANSWERS:
        likely = [f"{token!r} {probability:.2f}" for token, probability in found[name]["next_tokens"]]
        lines.append(f"{name:>6}: {', '.join(likely)}")
    if found["mode"] != "none" and found["next_token_kl"] < _NOTHING:
        lines.append("nothing changed: give another --layers (a middle one, say), --mode or --prompt_index")
    lines += ["", *_words(found)] if "lens" in found else []
    return "\n".join([*lines, f"intervention: {done.out / INTERVENTION}"])


def _words(found: dict[str, Any]) -> list[str]:
    """What every direction is read as, a line for each end."""
    lines = []
    for layer, directions in found["lens"].items():
        names = [f"component {c}" for c in found.get("components", ())] or ["difference"]
        shares = found.get("of", {}).get(layer, ())
        for place, (name, ends) in enumerate(zip(names, directions, strict=True)):
            share = f", {shares[place]:.1%} of the variance" if shares else ""
            lines.append(f"layer {layer} {name}{share}:")
            lines += [shortened(f"  {sign} {' '.join(map(repr, words))}") for sign, words in ends.items()]
    return lines
