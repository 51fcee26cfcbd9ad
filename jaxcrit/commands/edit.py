"""``jaxcrit edit``: changes facts in a few layers, in closed form, and says what else changed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import numpy as np

from jaxcrit.commands import shared
from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.groups import BY_HASH, SELECTION, SHAPE, FactOptions, MeshOptions, ModelOptions, OutOptions
from jaxcrit.core.layers import ChosenLayers, LayerSet
from jaxcrit.core.options import option
from jaxcrit.core.schema import ANY, Array, Count, Range, Size, conform, conform_arrays
from jaxcrit.core.selections import LayerSpec, resolve
from jaxcrit.reporting import tables

if TYPE_CHECKING:
    from jaxcrit.core.rundir import RunDirectory
    from jaxcrit.data.facts import Fact
    from jaxcrit.data.templates import Example
    from jaxcrit.models.model import Bars, Model
    from jaxcrit.models.overlays import Overlay
    from jaxcrit.reporting.report import Report
    from jaxcrit.studies.covariance import Covariances
    from jaxcrit.studies.editing import Edited, Keep
    from jaxcrit.studies.fact_scores import Answers, Question

EDITS, KEYS, PARTIAL = "edits.json", "keys.npz", "partial.npz"
_OPENING = 10  # tokens
_HELD = 32  # rows of the text that are kept for its loss, at most
_FELL, _OF_A_RELATION = 0.2, 0.3
CAVEATS = (
    "Greedy: every token of the target is the model's most probable one, given those before it.",
    "Preferred: the wanted answer is more probable than the other; of a neighbour, the one it has over the new target.",
    "Before is the model below all edits, always.",
    "Intervals are Wilson's 95 % over questions; questions of one fact are not independent.",
)


class Said(TypedDict):
    """Answers to questions of a kind, see `jaxcrit.studies.fact_scores.summary`."""

    questions: Size
    greedy: Annotated[float, Range(0, 1)]
    p: float
    compared: Count
    preferred: float | None


class AllSaid(TypedDict):
    """Answers of a model; those of facts are always there."""

    own: Said
    text_loss: float


class EverySaid(AllSaid, total=False):
    """With those that facts may lack."""

    paraphrase: Said
    neighbour: Said


class Changed(TypedDict):
    """What became of a layer."""

    relative: float
    condition: float
    share: float


class Sought(Changed, total=False):
    """With what only a layer has whose vectors were sought."""

    loss_before: float
    loss_after: float
    length: float


class Result(TypedDict):
    """``result`` of ``run.json``."""

    facts: Size
    before: EverySaid
    after: EverySaid
    layers: dict[str, Sought]


class Below(TypedDict):
    """The model below all edits."""

    hash: str


class EditedRun(TypedDict):
    """``run.json`` of a complete run."""

    base: Below
    edits: Size
    layers: ChosenLayers
    result: Result
    warnings: list[str]


class PartialMeta(TypedDict):
    """The meta entry of what an interrupted run keeps."""

    identity: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditOptions(ModelOptions, FactOptions, OutOptions, MeshOptions, title="edit"):
    """What ``jaxcrit edit`` is asked."""

    on: str = option("", "instead of --model: an edit run, whose facts stay", word="RUN", free=BY_HASH)
    covariance_data: str = option("", "rows of any text, which is to stay as it is", word="FILE", free=BY_HASH)
    layers: str = option("", SELECTION, word="SPEC")
    scores: str = option("", "scores.json for layers by a score, and of trace", word="FILE", free=BY_HASH)
    boundary: bool | None = option(None, "the first and last of these layers only (default: with full)")
    residual: str = option("full", "full: sought anew at each layer; spread: shared", ("full", "spread"))
    covariance_weight: float = option(1.0, "weight of the text, in feed-forward widths", above=0)
    covariance_tokens: int = option(0, "tokens of it; 0 for ten times that width", lowest=0)
    contexts: int = option(5, "openings of rows of the text in front of prompts", lowest=0)
    steps: int = option(25, "steps of the search for a fact's vector, at most", lowest=1)
    step_size: float = option(0.1, "length of a step, in that of the state", above=0)
    clamp: float = option(0.75, "length of the vector at most, in that of the state", above=0)
    batch_size: int = option(64, "rows per pass", lowest=1, free=SHAPE, group="machine")

    def check(self) -> None:
        """Refuses what leaves nothing to do, and two models."""
        super().check()
        if self.on and self.model:
            raise UserError(f"--on={self.on} --model={self.model}: give one of them")


OPTIONS = EditOptions


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """What an edit did.

    Attributes:
        model: changed model; None where a complete run was read back.
        run: content of ``run.json``.
        out: run directory; None where nothing is written.
    """

    model: Model | None
    run: Mapping[str, Any]
    out: Path | None


def run(options: EditOptions) -> int:
    """Edits, writes the run directory, prints the report."""
    from jaxcrit.core.progress import bars

    found = run_edit(options, progress=bars)
    return shared.tell(report(found.run), found.out)


@shared.public
def edit(
    model: Any,
    facts: Any,
    layers: Any,
    text: Any,
    *,
    out: str | Path = "",
    progress: Bars | None = None,
    **options: Any,
) -> Model:
    """Changes facts of a model. The model given stays as it is.

    Args:
        model: a `Model`, or the name of one, as `load` takes it.
        facts: a file of facts, or a list of dicts as in one; ``target`` is what they are to become.
        layers: a `LayerSet`, layers by number, or a selection.
        text: rows of any text, which is to stay as it is; as `read_datasets` takes them.
        out: run directory; empty writes nothing.
        progress: maker of progress bars (tqdm's signature); None for silence.
        **options: fields of `EditOptions`.

    Returns:
        The changed model.

    Raises:
        UserError: a mistake in options, checkpoint, facts or rows.
    """
    named = ",".join(map(str, layers.layers)) if isinstance(layers, LayerSet) else layers
    asked = shared.options_for(EditOptions, out, {**options, "layers": named})
    found = run_edit(asked, model=model, facts=facts, text=text, progress=progress, keep=bool(out))
    return found.model or shared.opened(asked, str(out))


def run_edit(
    options: EditOptions,
    *,
    model: Any = None,
    facts: Any = None,
    text: Any = None,
    progress: Bars | None = None,
    keep: bool = True,
) -> Edit:
    """Edits; goes on where an interrupted run of the same options stopped, reads a complete one back.

    Args:
        options: what is asked.
        model: model in place of the one that the options name.
        facts: facts in place of those that the options name.
        text: rows in place of those that ``--covariance_data`` names.
        progress: maker of progress bars; None for silence.
        keep: whether a run directory is written.

    Raises:
        UserError: see `edit`.
    """
    from jaxcrit.core.run import running
    from jaxcrit.data.dataset import MEMORY, Dataset
    from jaxcrit.data.facts import placed
    from jaxcrit.studies.covariance import covariances
    from jaxcrit.studies.editing import Method, check, edited, rows_of

    if not options.layers:
        raise UserError("edit: expected --layers, such as --layers=@TRACE/layers.json; jaxcrit trace finds some")
    if facts is None and not options.facts:
        raise UserError("edit: expected --facts=FILE, whose targets are what is to become true")
    if text is None and not options.covariance_data:
        raise UserError("edit: expected --covariance_data=FILE, rows of any text that is to stay as it is")
    opened, base, old = _opened(options, model)
    if keep and any(overlay.run is None for overlay in opened.overlays):
        raise UserError(
            f"--out={options.out}: the model was changed in memory, so a run on it could not be opened again; give"
            " --out to that change too"
        )
    check(opened.config)
    given = shared.facts_of(options, facts)
    chosen, jump = _chosen(options, opened)
    dataset = Dataset("facts", options.facts or MEMORY, [one.example for one in placed(given, opened.tokenizer)])
    every = texts_of(options, opened, text)
    texts, held = parted(every, options.covariance_tokens or 10 * opened.config.ff_width)
    openings = tuple(_opening(opened, one) for one in texts[: options.contexts])
    method = Method(
        options.residual,  # type: ignore[arg-type]
        options.covariance_weight,
        options.steps,
        options.step_size,
        options.clamp,
        openings,
        options.batch_size,
    )
    rows_of(opened, given, method)  # what it refuses is refused before anything is written
    with running(
        "edit",
        options,
        models={"model": opened},
        datasets=[dataset, Dataset("text", options.covariance_data or MEMORY, every)],
        resolved={"layers": list(chosen.layers)},
        keep=keep,
        read_back=EditedRun,
    ) as run:
        if run.complete:
            return Edit(None, run.earlier, run.path)
        run.precious = True
        run.record |= {"base": base.describe(), "layers": {**dataclasses.asdict(chosen), "layers": list(chosen.layers)}}
        run.record["edits"] = len(opened.overlays) - len(base.overlays) + 1
        moments = covariances(base, texts, chosen.layers, options.batch_size, progress)
        kept = _keeper(run.directory)
        done = edited(opened, given, chosen.layers, moments.moments, method, old=old, keep=kept, bars=progress)
        overlay = _overlay(opened, chosen, done, run.out)
        run.record["trained"] = overlay.partition.to_json()
        changed = opened.with_overlay(overlay)
        asked, before, after, losses = _asked(base, changed, given, held, options, progress)
        run.record["result"] = _result(done, asked, before, after, losses, moments)
        run.record["warnings"] = _warnings(given, chosen, jump, done, asked, before, after, moments)
        if run.out is not None:
            _write(run.out, overlay, given, done, old, asked, before, after)
            report(run.record).write(run.out, run.record)
    return Edit(changed, run.record, run.out)


def _opened(options: EditOptions, model: Any) -> tuple[Model, Model, dict[int, np.ndarray]]:
    """The model to change, the one below all edits, and by layer the keys of earlier edits."""
    from jaxcrit.core import processes
    from jaxcrit.core.files import DAMAGED, as_path
    from jaxcrit.core.rundir import read_record

    name = options.on or (options.model if model is None else model)
    folder = as_path(name) if isinstance(name, str | Path) and name else None
    record: dict[str, Any] = {}
    if folder is not None:
        file = folder / "run.json"
        record = processes.share(lambda: read_record(folder) if file.is_file() else {})
    is_edit = record.get("command") == "edit"
    if options.on and not is_edit:
        raise UserError(f"--on={options.on}: expected a run of jaxcrit edit; a model to begin with is --model")
    if not options.on and is_edit:
        raise UserError(
            f"--model={name}: is a run of jaxcrit edit; --on={name} changes it further, and keeps its facts"
        )
    opened = shared.opened(options, options.on or model)
    if not options.on or folder is None:
        return opened, opened, {}
    conform(record, EditedRun, str(folder / "run.json"), DAMAGED)
    if record["edits"] > len(opened.overlays):
        raise UserError(f"{folder / 'run.json'}: expected at most {len(opened.overlays)} edits, got more; {DAMAGED}")
    below = opened.overlays[: len(opened.overlays) - record["edits"]]
    base = dataclasses.replace(opened, overlays=below, model_hash=record["base"]["hash"])
    sizes = folder / KEYS, opened.config.num_layers, opened.config.ff_width
    layers = processes.share(lambda: sorted(read_keys(*sizes)))
    arrays = read_keys(*sizes) if processes.first() else {}
    return opened, base, {layer: processes.share_array(arrays.get(layer)) for layer in layers}


def read_keys(path: Path, num_layers: int, ff_width: int) -> dict[int, np.ndarray]:
    """Reads keys of earlier edits, by layer ``[o, F]``.

    Raises:
        UserError: absent, damaged, of another model, or not finite.
    """
    from jaxcrit.core.files import DAMAGED, Npz, read_npz

    found, _ = read_npz(path, Npz("jaxcrit.keys", {}, others=Array("f", (ANY, "F"))), F=ff_width)
    named = {f"layer_{layer}": layer for layer in range(num_layers)}
    if strange := sorted(name for name, keys in found.items() if name not in named or not np.isfinite(keys).all()):
        raise UserError(f"{path}: expected finite keys of {num_layers} layers, got {listed(strange, 3)}; {DAMAGED}")
    return {named[name]: keys for name, keys in found.items()}


def _chosen(options: EditOptions, model: Model) -> tuple[LayerSet, int | None]:
    """The layers to change; and where the answer arrives at the last token, if the scores given say so."""
    from jaxcrit.core.layers import read_scores
    from jaxcrit.criteria.trace import rises

    spec = LayerSpec.parse(options.layers)
    scores = read_scores(options.scores) if options.scores else None
    depth = model.config.num_layers
    chosen = resolve(spec, depth, scores=scores, model_hash=model.model_hash if not options.on else None)
    ends = options.residual == "full" if options.boundary is None else options.boundary
    if not chosen.layers:
        raise UserError(f"--layers={options.layers}: names no layer")
    if ends and len(chosen.layers) > 2:
        first_last = (chosen.layers[0], chosen.layers[-1])
        chosen = dataclasses.replace(chosen, layers=first_last, rule=f"boundary({chosen.rule})")
    last = (scores or {}).get("trace_last")
    return chosen, None if last is None else int(np.argmax(rises(last.values)))


def texts_of(options: EditOptions, model: Model, text: Any = None) -> list[Example]:
    """Rows of ordinary text, whole, cut to the context.

    Raises:
        UserError: see `named_rows`; or fewer than two rows.
    """
    from jaxcrit.core.groups import RowOptions
    from jaxcrit.data.dataset import Dataset, named_rows, whole

    asked, examples = RowOptions(data=options.covariance_data, template="none"), []
    for named in named_rows(text, asked, "train"):
        found = named.examples if isinstance(named, Dataset) else whole(named, model.tokenizer, asked)
        examples += [
            dataclasses.replace(one, token_ids=ids, prompt_length=len(ids))
            for one in found
            if len(ids := one.token_ids[: model.config.max_length]) > 1
        ]
    if len(examples) < 2:
        raise UserError(f"--covariance_data={options.covariance_data}: expected two rows or more, got {len(examples)}")
    return examples


def parted(examples: Sequence[Example], tokens: int) -> tuple[list[Example], list[Example]]:
    """Rows for the covariance, up to so many tokens; and some from the end, for the loss of text."""
    held = max(1, min(_HELD, len(examples) // 10))
    texts, count = [], 0
    for one in examples[:-held]:
        if count >= tokens:
            break
        texts.append(one)
        count += one.prompt_length - 1
    return texts, list(examples[-held:])


def _opening(model: Model, example: Example) -> str:
    """The first tokens of a text, as a sentence in front of a prompt."""
    text = model.tokenizer.decode(example.token_ids[:_OPENING].tolist(), skip_special_tokens=True)
    return " ".join(text.split()) + ". "


def _keeper(directory: RunDirectory | None) -> Keep:
    """Keeps arrays by name in the run directory, until the run is complete."""
    from jaxcrit.core import processes
    from jaxcrit.core.files import DAMAGED, write_npz

    kept: dict[str, np.ndarray] = {}
    file = None if directory is None else directory.path / PARTIAL
    identity = "" if directory is None else directory.identity

    if file is not None and directory is not None and directory.resumed:
        found = processes.share(lambda: {name: one.tolist() for name, one in read_sought(file, identity).items()})
        kept = {name: np.array(value, np.float32) for name, value in found.items()}

    def keep(name: str, make: Any, holds: Mapping[str, Array]) -> dict[str, np.ndarray]:
        mine = {key.removeprefix(f"{name}/"): value for key, value in kept.items() if key.startswith(f"{name}/")}
        if mine:
            conform_arrays(mine, holds, f"{file}: {name}", DAMAGED)
            return mine
        made: dict[str, np.ndarray] = make()
        kept.update({f"{name}/{key}": value for key, value in made.items()})
        if file is not None:
            write_npz(file, kept, {"format": "jaxcrit.partial", "format_version": 1, "identity": identity})
        return made

    return keep


def read_sought(path: Path, identity: str) -> dict[str, np.ndarray]:
    """Reads what an interrupted run of this identity has kept; nothing of another.

    Raises:
        UserError: it is damaged.
    """
    from jaxcrit.core.files import Npz, read_npz

    if not path.exists():
        return {}
    found, meta = read_npz(path, Npz("jaxcrit.partial", {}, PartialMeta, others=Array("f", None)))
    return found if meta["identity"] == identity else {}


def _overlay(model: Model, chosen: LayerSet, done: Edited, out: Path | None) -> Overlay:
    """The change as adapters on ``down`` of rank n; as whole layers where these are smaller."""
    import jax

    from jaxcrit.models.lora import A, B, Lora
    from jaxcrit.models.overlays import Overlay
    from jaxcrit.models.partition import TRAIN, partition
    from jaxcrit.studies.editing import DOWN

    config, each = model.config, list(done.layers.values())
    rank = len(each[0].keys)
    given: dict[str, Any] = {}
    if rank * (config.width + config.ff_width) < config.width * config.ff_width:
        parts = partition(config, chosen.layers, lora=Lora(rank, float(rank), (DOWN.removeprefix("blocks."),)))
        given[DOWN + A] = np.stack([one.readout for one in each])
        given[DOWN + B] = np.stack([one.residual.T for one in each])
    else:
        parts = partition(config, chosen.layers)
        layers = np.asarray(chosen.layers)
        given = {
            path: value[layers].astype(np.float32) for path, value in done.weights.items() if path.startswith("blocks.")
        }
    like = parts.abstract(model.mesh, np.float32)[TRAIN]
    params = {path: jax.device_put(given[path], one.sharding) for path, one in like.items()}
    return Overlay(parts, {TRAIN: params}, None if out is None else out.resolve(), 0, chosen)


def _asked(
    base: Model, changed: Model, facts: Sequence[Fact], held: Sequence[Example], options: EditOptions, bars: Bars | None
) -> tuple[list[Question], Answers, Answers, tuple[float, float]]:
    """Questions, what the model below and the changed one make of them, and the loss of text of both."""
    from jaxcrit.core.remembered import Arrays, remembered
    from jaxcrit.studies.fact_scores import Answers, answered, questions, text_loss

    asked, size = questions(facts), options.batch_size

    def ask(model: Model) -> Arrays:
        return vars(answered(model, model.decoder(bars), asked, size, bars))

    def loss(model: Model) -> Arrays:
        return {"loss": np.array(text_loss(model, model.decoder(bars), held, min(8, size)))}

    # What the model below all edits says is the same whatever is changed.
    told = {"questions": list(map(dataclasses.asdict, asked)), "batch_size": size}
    number = (len(asked),)
    holds = {"p": Array("f", number), "other": Array("f", number), "right": Array("b", number)}
    before = remembered("answers", {**base.determines, **told}, holds, lambda: ask(base))
    read = {"texts": [one.token_ids.tolist() for one in held], "batch_size": size}
    first = remembered("text_loss", {**base.determines, **read}, {"loss": Array("f", ())}, lambda: loss(base))
    losses = float(first["loss"]), float(loss(changed)["loss"])
    return asked, Answers(**before), Answers(**ask(changed)), losses


def _result(
    done: Edited,
    asked: Sequence[Question],
    before: Answers,
    after: Answers,
    losses: tuple[float, float],
    moments: Covariances,
) -> dict[str, Any]:
    from jaxcrit.studies.fact_scores import summary

    return {
        "model_step": 0,
        "facts": len(next(iter(done.layers.values())).keys),
        "before": {**summary(asked, before), "text_loss": losses[0]},
        "after": {**summary(asked, after), "text_loss": losses[1]},
        "covariance": {"tokens": moments.tokens, "shrunk": moments.shrunk, "cached": list(moments.cached)},
        "layers": {
            str(layer): {
                "relative": one.relative,
                "share": float(one.share.mean()),
                "condition": one.condition,
                **{name: float(value.mean()) for name, value in done.of_search(layer).items()},
            }
            for layer, one in done.layers.items()
        },
    }


def _warnings(
    facts: Sequence[Fact],
    chosen: LayerSet,
    jump: int | None,
    done: Edited,
    asked: Sequence[Question],
    before: Answers,
    after: Answers,
    moments: Covariances,
) -> list[str]:
    from jaxcrit.studies.fact_scores import NEIGHBOUR

    told = []
    if moments.shrunk:
        told.append(
            f"the covariance is of {moments.tokens} tokens, fewer than ten for each of its directions, and is drawn"
            f" towards the identity by {moments.shrunk:.2f}; give more --covariance_data"
        )
    near = np.array([one.kind == NEIGHBOUR for one in asked])
    if not near.any():
        told.append("no fact has neighbours, so that what else has changed of its relation is not seen")
    elif (was := before.right[near].mean()) - (now := after.right[near].mean()) > _FELL:
        told.append(f"neighbours whose answer is right fell from {was:.2f} to {now:.2f}")
    large = [str(layer) for layer, one in done.layers.items() if one.relative > 1]
    if large:
        told.append(f"the change of layer {', '.join(large)} is longer than its weight")
    moved = np.any([one.length > 0 for one in done.sought.values()], axis=0)
    true = [fact.text for fact, changed in zip(facts, moved, strict=True) if not changed]
    if true:
        told.append(f"true already, and left as they are: {listed([repr(text) for text in true], 3)}")
    edits = Counter(fact.relation for fact in facts)
    others = {fact.relation: set[str]() for fact in facts}
    for fact in facts:
        others[fact.relation] |= {text for text, _ in fact.neighbours}
    for relation, count in edits.items():
        share = count / (count + len(others[relation]))
        if count > 1 and others[relation] and share > _OF_A_RELATION:
            told.append(
                f"{share:.0%} of the subjects given of {relation!r} are changed at once: the relation itself moves"
            )
    if jump is not None and chosen.layers[-1] >= jump:
        told.append(
            f"layer {chosen.layers[-1]} is not below {jump}, where the answer has arrived at the last token already"
            " (trace_last)"
        )
    return told


def _write(
    out: Path,
    overlay: Overlay,
    facts: Sequence[Fact],
    done: Edited,
    old: Mapping[int, np.ndarray],
    asked: Sequence[Question],
    before: Answers,
    after: Answers,
) -> None:
    """The change as a checkpoint, as finetune leaves one; keys for further edits; what became of every fact."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxcrit.core.files import plain, write_json, write_npz
    from jaxcrit.studies.fact_scores import OWN
    from jaxcrit.training.checkpoints import Checkpoints
    from jaxcrit.training.step import State

    assert overlay.chosen is not None
    overlay.chosen.save(out / "layers.json")
    mesh = jax.tree.leaves(overlay.params)[0].sharding.mesh
    nothing = jax.device_put(np.zeros(1, np.float32), NamedSharding(mesh, PartitionSpec()))  # of all processes
    with Checkpoints(out, keep=1) as checkpoints:
        checkpoints.save(State(overlay.params, {"none": nothing}, 0), {})
        checkpoints.wait()
    keys = {f"layer_{layer}": one.keys for layer, one in done.layers.items()}
    for layer, earlier in old.items():
        name = f"layer_{layer}"
        keys[name] = np.concatenate([earlier, keys[name]]) if name in keys else earlier
    write_npz(out / KEYS, keys, {"format": "jaxcrit.keys", "format_version": 1})
    own = [number for number, one in enumerate(asked) if one.kind == OWN]
    rows = [
        {
            "text": fact.text,
            "target": fact.target,
            "old": fact.old,
            "relation": fact.relation,
            "p": [before.p[place], after.p[place]],
            "p_old": [before.other[place], after.other[place]],
            "greedy": [bool(before.right[place]), bool(after.right[place])],
            "layers": {
                str(layer): {name: float(value[number]) for name, value in done.of_search(layer).items()}
                for layer in done.sought
            },
        }
        for number, (fact, place) in enumerate(zip(facts, own, strict=True))
    ]
    told = [
        {**dataclasses.asdict(one), "right": [bool(a), bool(b)]}
        for one, a, b in zip(asked, before.right, after.right, strict=True)
    ]
    write_json(out / EDITS, "jaxcrit.edits", plain({"facts": rows, "questions": told}))


def report(run: Mapping[str, Any]) -> Report:
    """What the model says of the facts, of paraphrases and of neighbours, before and after; the change by layer."""
    from jaxcrit.reporting.report import Report, Section

    result = run["result"]
    chosen = LayerSet.from_json(run["layers"], "run.json")
    own, before = result["after"]["own"], result["before"]
    facts = f"{result['facts']} fact{'s' if result['facts'] > 1 else ''}"
    headline = [
        f"{own['greedy']:.0%} of {facts} said after the change in {chosen}, {before['own']['greedy']:.0%} before",
        f"Loss of other text: {before['text_loss']:.4f} before, {result['after']['text_loss']:.4f} after",
    ]
    sections = [
        Section("Answers", "", _answers(result)),
        Section("Layers", "", _layers(result)),
    ]
    return Report(headline, run["warnings"], sections, CAVEATS)


def _answers(result: Mapping[str, Any]) -> str:
    from jaxcrit.evaluation.intervals import wilson

    header = ["questions", "number", "greedy before", "after", "95 %", "p before", "after", "preferred after", "of"]
    rows = []
    for kind in ("own", "paraphrase", "neighbour"):
        if kind not in result["before"] or kind not in result["after"]:
            continue
        before, after = (result[when][kind] for when in ("before", "after"))
        low, high = wilson(round(after["greedy"] * after["questions"]), after["questions"])
        preferred = "-" if after["preferred"] is None else f"{after['preferred']:.2f}"
        rows.append(
            [
                kind,
                str(after["questions"]),
                f"{before['greedy']:.2f}",
                f"{after['greedy']:.2f}",
                f"{low:.2f} to {high:.2f}",
                tables.number(before["p"], 3),
                tables.number(after["p"], 3),
                preferred,
                str(after["compared"]),
            ]
        )
    return tables.table(header, rows)


def _layers(result: Mapping[str, Any]) -> str:
    header = ["layer", "loss before", "after", "vector / state", "reached", "change / weight", "condition"]
    rows = [
        [
            layer,
            *(tables.number(one.get(name, np.nan), 3) for name in ("loss_before", "loss_after", "length", "share")),
            tables.number(one["relative"]),
            f"{one['condition']:.1e}",
        ]
        for layer, one in result["layers"].items()
    ]
    return tables.table(header, rows)
