"""``jaxcrit generate``: a model's answers to every prompt, in ``generations.jsonl``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from jaxcrit.commands import shared
from jaxcrit.core import console
from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import (
    BY_HASH,
    SHAPE,
    BatchOptions,
    MeshOptions,
    ModelOptions,
    OutOptions,
    PrefixOptions,
    RowOptions,
)
from jaxcrit.core.options import option
from jaxcrit.core.schema import Count
from jaxcrit.reporting.tables import shortened

if TYPE_CHECKING:
    from jaxcrit.data.batches import Batch
    from jaxcrit.data.dataset import Dataset
    from jaxcrit.data.templates import Example
    from jaxcrit.models.generation import Prefilled
    from jaxcrit.models.model import Bars, Model

GENERATIONS = "generations.jsonl"
_SHOWN = 3
Row = dict[str, Any]


class Answer(TypedDict):
    """A row of ``generations.jsonl``."""

    sample_id: str
    row: Count
    prompt: str
    token_ids: list[Count]
    text: str
    stopped: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(
    ModelOptions, RowOptions, PrefixOptions, OutOptions, BatchOptions, MeshOptions, title="generation"
):
    """What ``jaxcrit generate`` is asked."""

    batch_size: int = option(16, "prompts at a time, at most", lowest=1, free=SHAPE)
    max_new_tokens: int = option(64, "tokens of each answer, at most", lowest=1)
    stop: str = option("", "more tokens that end an answer, ids or texts, with commas", word="TOKENS")
    temperature: float = option(0.0, "temperature of the draws; 0 takes the most likely token")
    top_k: int = option(0, "draws from the k most likely tokens; 0 from all", lowest=0)
    top_p: float = option(1.0, "draws from the likeliest tokens of this share together")
    repetition_penalty: float = option(1.0, "above 1 avoids tokens that have been used")
    seed: int = option(0, "seed of the draws", lowest=0)
    sender: str = option("", "model whose keys and values of prefixes are reused", word="DIR", free=BY_HASH)
    recompute: str = option("", "layers not reused: @layers.json of reuse, first:4, all, ...", word="SPEC")

    def check(self) -> None:
        """Refuses a sender without layers, and options of a sender without one."""
        super().check()
        if self.sender and not self.recompute:
            raise UserError(
                f"--sender={self.sender}: expected the layers to recompute too: --recompute=@DIR/layers.json of jaxcrit"
                " reuse, or first:4 and the like"
            )
        for name in ("recompute", "prefix"):
            if getattr(self, name) != getattr(type(self), name) and not self.sender:
                raise UserError(f"--{name}={getattr(self, name)}: is of --sender; give it too")


OPTIONS = GenerateOptions


@dataclasses.dataclass(frozen=True, eq=False)
class Generations:
    """A finished run.

    Attributes:
        run: what ``run.json`` holds.
        rows: by dataset, the rows of its ``generations.jsonl``.
        out: run directory; None where nothing is written.
    """

    run: dict[str, Any]
    rows: dict[str, list[Row]]
    out: Path | None

    @property
    def texts(self) -> list[str]:
        """Answers of the only dataset, in the order of its prompts."""
        (rows,) = self.rows.values()
        return [row["text"] for row in rows]


def run(options: GenerateOptions) -> int:
    """Generates, shows the first answers, says where all of them are."""
    from jaxcrit.core.progress import bars

    found = run_generate(options, progress=bars)
    console.tell(text(found))
    shared.tell_next("generate", options, found.out)
    return 0


@shared.public
def generate(
    model: str | Path | Model = "",
    rows: Any = None,
    *,
    out: str | Path = "",
    progress: Bars | None = None,
    **options: Any,
) -> Generations:
    """Lets a model answer prompts.

    Args:
        model: a `Model`, or the name of one, as `load` takes it.
        rows: prompts, as `Model.read` takes them.
        out: run directory; empty writes nothing.
        progress: maker of progress bars (tqdm's signature); None for silence.
        **options: fields of `GenerateOptions`: ``max_new_tokens``, ``temperature``, ...

    Returns:
        Answers by dataset, in the order of the prompts; ``.texts`` are those of the only dataset.

    Raises:
        UserError: a mistake in options, checkpoint or rows.
    """
    asked = shared.options_for(GenerateOptions, out, options)
    return run_generate(asked, model=model, rows=rows, progress=progress, keep=bool(out))


def run_generate(
    options: GenerateOptions, *, model: Any = None, rows: Any = None, progress: Bars | None = None, keep: bool = True
) -> Generations:
    """`generate` of options; what is given beside them stands in place of what they name.

    An interrupted run of the same options goes on, a complete one is read back.
    ``keep`` says whether a run directory is written.
    """
    from jaxcrit.core.run import running
    from jaxcrit.data.batches import make_batches
    from jaxcrit.data.prefix import with_prefixes
    from jaxcrit.evidence.answers import answers
    from jaxcrit.models.generation import blocks_apart
    from jaxcrit.models.sampling import Sampling
    from jaxcrit.models.stops import stop_tokens

    sampling = Sampling(options.repetition_penalty, options.temperature, options.top_k, options.top_p)
    model = shared.opened(options, model)
    mixed = _Mixed.of(options, model) if options.sender else None
    stop = stop_tokens(options.stop, model, options.template)
    datasets = model.read(options, rows, reserve=options.max_new_tokens)
    models = {"model": model}
    if mixed is not None:
        boundary = model.config.rope.boundary
        datasets = with_prefixes(datasets, options, boundary=boundary, reserve=options.max_new_tokens)
        models["sender"] = mixed.sender
    # The sampling in canonical form: options that do not matter beside the others are told apart by nothing.
    resolved = {"stop": stop, **dataclasses.asdict(sampling)}
    if mixed is not None:
        resolved["recompute"] = list(mixed.recompute)
    with running("generate", options, models=models, datasets=datasets, resolved=resolved, keep=keep) as run:
        apart = blocks_apart(options.max_new_tokens, model.mesh)
        run.times |= {"new_tokens": 0, "decoding": "blocks apart" if apart else "blocks in one stack"}
        # One pool for all datasets; draws follow from a row's place in its own.
        examples = [example for dataset in datasets for example in dataset.examples]
        numbers = np.concatenate([np.arange(len(dataset.examples)) for dataset in datasets])
        how: dict[str, Any] = {"stop": stop, "numbers": numbers, "sampling": sampling, "seed": options.seed}

        def answer(batch: Batch) -> list[tuple[int, Row]]:
            made, decoder = [], model.decoder(progress)
            prompts = None if mixed is None else mixed.prompts(model, batch, examples, options)
            for one in answers(model, decoder, batch, len(examples), options.max_new_tokens, prompts=prompts, **how):
                example, row = examples[one.row], int(numbers[one.row])
                which = {"sample_id": example.sample_id, "row": row, "prompt": example.prompt}
                made.append((one.row, {**which, "token_ids": one.token_ids, "text": one.text, "stopped": one.stopped}))
                run.times["new_tokens"] += len(one.token_ids)
            return made

        budget = model.budget(options.batch_size, new_tokens=options.max_new_tokens)
        batches = make_batches(examples, budget, max_length=model.config.max_length)
        folders = [None if run.out is None else run.folder(one.name, len(datasets) == 1) for one in datasets]
        found = _rows(datasets, batches, folders, answer, progress)
    return Generations(run.record, found, run.out)


@dataclasses.dataclass(frozen=True, eq=False)
class _Mixed:
    """Another model whose keys and values of prefixes are reused, but for some layers."""

    sender: Model
    recompute: tuple[int, ...]

    @classmethod
    def of(cls, options: GenerateOptions, model: Model) -> _Mixed:
        """Opens the sender, checks the pair, resolves the layers."""
        from jaxcrit.core.selections import LayerSpec, resolve

        spec = LayerSpec.parse(options.recompute, "recompute")
        _, sender = shared.pair(options, ("model", "sender"), (model, None))
        hint = "give the layers.json of jaxcrit reuse, as @DIR/layers.json"
        depth, own = model.config.num_layers, model.model_hash
        return cls(sender, resolve(spec, depth, model_hash=own, flag="recompute", hint=hint).layers)

    def prompts(self, model: Model, batch: Batch, examples: Sequence[Example], options: GenerateOptions) -> Prefilled:
        """A batch over the mixed cache; a row that fills up has no prefix."""
        from jaxcrit.models.mixed import mixed_prefill

        prefix = np.array([examples[row].prefix_length if row < len(examples) else 0 for row in batch.rows])
        given = (batch.tokens, batch.lengths, prefix, self.recompute, options.max_new_tokens, model.mesh)
        return mixed_prefill(model.decoder(), self.sender.decoder(), *given)


def _rows(
    datasets: Sequence[Dataset],
    batches: Sequence[Batch],
    folders: Sequence[Path | None],
    answer: Callable[[Batch], list[tuple[int, Row]]],
    progress: Bars | None,
) -> dict[str, list[Row]]:
    """Answers by dataset in the order of its rows; those of an interrupted run are in a part that grows, of each."""
    from jaxcrit.core.files import DAMAGED, json_lines, write_text
    from jaxcrit.core.progress import bar
    from jaxcrit.evidence.rows import GrowingRows
    from jaxcrit.parallel.preemption import one_by_one

    counts, names = [len(dataset.examples) for dataset in datasets], [dataset.name for dataset in datasets]
    starts, total, parts = np.cumsum([0, *counts]), sum(counts), []
    for folder, count in zip(folders, counts, strict=True):
        part, whole = (None, None) if folder is None else (folder / f"{GENERATIONS}.part", folder / GENERATIONS)
        parts.append(GrowingRows(part, lambda row: row["row"], Answer, whole))
        if any(row >= count for row in parts[-1].rows):
            raise UserError(f"{part}: expected answers of {count} prompts, got more; {DAMAGED}")
    done = {int(start) + row for start, part in zip(starts, parts, strict=False) for row in part.rows}
    left = [batch for batch in batches if not done.issuperset(batch.rows[batch.rows < total].tolist())]
    shown_as = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    with bar(progress, total=total, desc=shown_as, initial=len(done)) as shown:

        def do(batch: Batch) -> None:
            made = answer(batch)
            of = np.searchsorted(starts, [place for place, _ in made], side="right") - 1
            for which, part in enumerate(parts):
                part.add([row for (_, row), mine in zip(made, of, strict=True) if mine == which])
            done.update(place for place, _ in made)
            shown.update(len(made))

        def flush() -> None:
            for part in parts:
                part.flush()

        one_by_one(left, do, lambda _: f"with {len(done)} of {total} prompts answered", flush)
    found = {}
    for name, kept, folder in zip(names, parts, folders, strict=True):
        found[name] = [kept.rows[row] for row in sorted(kept.rows)]
        if folder is not None:
            write_text(folder / GENERATIONS, json_lines(found[name]))
        kept.forget()
    return found


def text(found: Generations) -> str:
    """The first answers of every dataset, one line each, how many came to an end, and where all are."""
    lines = []
    for name, rows in found.rows.items():
        lines += [shortened(f"{name} {row['row'] + 1}: {row['text']!r}") for row in rows[:_SHOWN]]
        stopped, tokens = sum(row["stopped"] for row in rows), sum(len(row["token_ids"]) for row in rows)
        lines.append(
            f"{name}: {len(rows)} answers of {tokens / max(len(rows), 1):.1f} tokens on average, {stopped} came to an"
            f" end by themselves, {len(rows) - stopped} at --max_new_tokens"
        )
    if found.out is not None:
        where = found.out if len(found.rows) == 1 else found.out / "*"
        lines.append(f"generations: {where / GENERATIONS}")
    return "\n".join(lines)
