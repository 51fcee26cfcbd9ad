"""Answers of a model to every prompt of ``--data``: a run directory with ``generations.jsonl``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxcrit.core import processes
from jaxcrit.core.files import GrowingText, write_text
from jaxcrit.core.run import running
from jaxcrit.data.batches import Batch, choose_buckets, make_batches
from jaxcrit.data.dataset import Dataset
from jaxcrit.data.templates import describe_template
from jaxcrit.models.decoder import Decoder
from jaxcrit.models.generation import generate
from jaxcrit.models.model import Bars, Model, open_model
from jaxcrit.models.sampling import Sampling
from jaxcrit.models.stops import stop_tokens
from jaxcrit.parallel.mesh import batch_rows
from jaxcrit.parallel.preemption import Preempted, notice
from jaxcrit.studies.options import GenerateOptions

GENERATIONS = "generations.jsonl"


@dataclasses.dataclass(frozen=True, eq=False)
class Generations:
    """A finished run.

    Attributes:
        run: what ``run.json`` holds.
        rows: by dataset, the rows of its ``generations.jsonl``.
        out: run directory; None where nothing is written.
    """

    run: dict[str, Any]
    rows: dict[str, list[dict[str, Any]]]
    out: Path | None

    @property
    def texts(self) -> list[str]:
        """Answers of the only dataset, in the order of its prompts."""
        (rows,) = self.rows.values()
        return [row["text"] for row in rows]


def run_generate(
    options: GenerateOptions,
    *,
    model: Any = None,
    rows: Any = None,
    progress: Bars | None = None,
    keep: bool = True,
) -> Generations:
    """Runs ``jaxcrit generate``; goes on where an earlier, interrupted run of the same configuration stopped.

    Args:
        options: what is asked.
        model: model in place of the one that the options name.
        rows: rows in place of those that the options name.
        progress: maker of progress bars (tqdm's signature), or None for silence.
        keep: whether a run directory is written.

    Raises:
        UserError: any mistake in flags, checkpoint or data; then nothing is left in the run directory.
    """
    sampling = sampling_of(options)
    model = open_model(options.model if model is None else model, mesh=options.mesh, dtype=options.dtype)
    stop = stop_tokens(options.stop, model, options.template)
    datasets = model.read(options, rows, reserve=options.max_new_tokens)
    # The sampling in canonical form: options that do not matter beside the others are told apart by nothing.
    resolved = {"stop": stop, "dtype": model.dtype, **dataclasses.asdict(sampling)}
    template = describe_template(model.tokenizer, options)
    with running(
        "generate",
        options,
        models={"model": model},
        datasets=datasets,
        template=template,
        resolved=resolved,
        keep=keep,
    ) as run:
        out = run.path if run.kept else None
        job = _Job(options, model, stop, datasets, out, progress)
        found = {dataset.name: job.rows(dataset) for dataset in datasets}
        run.times["new_tokens"] = job.new_tokens
    return Generations(run.record, found, out)


def sampling_of(options: GenerateOptions) -> Sampling:
    """How tokens are picked.

    Raises:
        UserError: see `Sampling`.
    """
    return Sampling(options.repetition_penalty, options.temperature, options.top_k, options.top_p)


class _Job:
    """The model and what all datasets of one run share; the weights are read when the first prompt needs them."""

    def __init__(
        self,
        config: GenerateOptions,
        model: Model,
        stop: list[int],
        datasets: list[Dataset],
        out: Path | None,
        progress: Bars | None,
    ):
        self.config, self.model, self.stop, self.out, self.progress = config, model, stop, out, progress
        self.alone = len(datasets) == 1
        self.decoder: Decoder | None = None
        self.new_tokens = 0
        self.batch_size = batch_rows(config.batch_size, model.mesh)
        lengths = [example.prompt_length for dataset in datasets for example in dataset.examples]
        self.buckets = choose_buckets(lengths, self.batch_size, model.config.max_length)

    def rows(self, dataset: Dataset) -> list[dict[str, Any]]:
        """Answers of one dataset in the order of its rows, those of an interrupted run included."""
        log = None if self.out is None else _Log(self.out if self.alone else self.out / dataset.name)
        done = {} if log is None else log.done
        bar, count = None, len(dataset.examples)
        if self.progress is not None:
            bar = self.progress(total=count, desc=dataset.name, initial=len(done))
        batches = make_batches(dataset.examples, self.batch_size, self.buckets)
        left = [batch for batch in batches if not all(row in done or row == count for row in batch.rows.tolist())]
        with notice() as leave:
            for number, batch in enumerate(left, 1):
                found = self._answers(dataset, batch)
                done |= {row["row"]: row for row in found}
                if log is not None:
                    log.append(found)
                if bar is not None:
                    bar.update(len(found))
                if leave(number) and number < len(left):
                    if log is not None:
                        log.flush()
                    raise Preempted(
                        f"told to leave with {len(done)} of {count} prompts answered; the same command goes on"
                    )
        if bar is not None:
            bar.close()
        rows = [done[row] for row in sorted(done)]
        if log is not None:
            log.finish(rows)
        return rows

    def _answers(self, dataset: Dataset, batch: Batch) -> list[dict[str, Any]]:
        if self.decoder is None:
            self.decoder = self.model.decoder(self.progress)
        config, tokenizer = self.config, self.model.tokenizer
        fills = batch.rows == len(dataset.examples)
        found = generate(
            self.decoder,
            batch.tokens,
            batch.lengths,
            config.max_new_tokens,
            stop=self.stop,
            sampling=sampling_of(config),
            seed=config.seed,
            samples=np.where(fills, -1, batch.rows),
            mesh=self.model.mesh,
        )
        rows = []
        for row, ids, stopped in zip(batch.rows.tolist(), found.token_ids, found.stopped.tolist(), strict=True):
            if row == len(dataset.examples):
                continue
            example = dataset.examples[row]
            self.new_tokens += len(ids)
            rows.append(
                {
                    "sample_id": example.sample_id,
                    "row": row,
                    "prompt": example.prompt,
                    "token_ids": ids,
                    "text": tokenizer.decode(ids, skip_special_tokens=True),
                    "stopped": stopped,
                }
            )
        return rows


class _Log:
    """Answers of one dataset on disk: a part that grows, then the file.

    Attributes:
        done: answers of an interrupted run by row.
    """

    def __init__(self, folder: Path):
        processes.make_directory(folder)
        self.file, self.part = folder / GENERATIONS, folder / f"{GENERATIONS}.part"
        self._text = GrowingText(self.part)
        self.done = {row["row"]: row for row in processes.share(lambda: [*_read(self.part), *_read(self.file)])}
        if self.done:  # whole lines only, whatever an interruption left
            self._text.start("".join(map(_line, self.done.values())))

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Adds answers."""
        self._text.append("".join(map(_line, rows)))

    def flush(self) -> None:
        """Returns when all of them are in the part."""
        self._text.flush()

    def finish(self, rows: list[dict[str, Any]]) -> None:
        """Writes the file, and removes the part."""
        write_text(self.file, "".join(map(_line, rows)))
        if processes.first():
            self.part.unlink(missing_ok=True)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read(file: Path) -> list[dict[str, Any]]:
    """Rows written so far; what an interruption cut short is left off."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
