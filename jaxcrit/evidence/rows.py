"""What substitution and ablation have in common: rows with responses, and losses that outlive an interruption."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from jaxcrit.core import processes
from jaxcrit.core.deletions import write_deletions
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import DAMAGED, GrowingText, Npz, json_lines, read_lines, read_npz, write_npz
from jaxcrit.core.layers import LayerScores, read_scores, write_scores
from jaxcrit.core.progress import bar
from jaxcrit.core.rundir import RunDirectory
from jaxcrit.core.schema import Array, Count, conform
from jaxcrit.data.batches import make_batches, response_mask
from jaxcrit.data.steps import Steps
from jaxcrit.data.templates import Example
from jaxcrit.evaluation.losses import most_scored
from jaxcrit.models.model import Bars, Model
from jaxcrit.parallel.preemption import one_by_one
from jaxcrit.training.data import token_batch
from jaxcrit.training.objectives import TokenBatch
from jaxcrit.training.step import place

_PARTIAL = "partial.npz"


class PartialMeta(TypedDict):
    """The meta entry of what an interrupted run keeps."""

    identity: str


_KEPT = Npz("jaxcrit.partial", {"losses": Array("f", ("V", "N")), "tokens": Array("iu", ("N",))}, PartialMeta)
_SAVE_SECONDS = 10.0
# batch, its rows' places among N, progress -> losses [V, B] summed over each row's response, tokens [B]
Take = Callable[[TokenBatch, np.ndarray, Callable[[int], None] | None], tuple[np.ndarray, np.ndarray]]


def sample_losses(
    examples: Sequence[Example],
    batch_size: int,
    model: Model,
    directory: RunDirectory | None,
    take: Take,
    num_variants: int,
    evaluations: int,
    progress: Bars | None,
    *,
    batches: Sequence[tuple[np.ndarray, Any]] | None = None,
    partial: str = _PARTIAL,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean loss of each sample under each variant, batch by batch.

    What is done is kept in the file ``partial`` and not done again when an interrupted run is given anew.

    Args:
        examples: N rows.
        batch_size: rows per batch; rounded up to what divides over the mesh.
        model: model, on its mesh.
        directory: directory of the run; None keeps nothing.
        take: does one batch.
        num_variants: V.
        evaluations: block evaluations of one batch, for the progress bar.
        progress: makes the bar.
        batches: batches of another kind for ``take``, each behind the places of its rows; default `batches_of`.
        partial: name of the file that keeps what is done; of several passes of a run each has its own.

    Returns:
        ``[V, N]`` float64 in nats, ``[N]`` response tokens, and the number of batches in all.

    Raises:
        Preempted: told to leave; what is done is kept.
    """
    losses, tokens = np.full((num_variants, len(examples)), np.nan), np.zeros(len(examples), np.int64)
    if (
        directory is not None
        and directory.resumed
        and (kept := processes.share(lambda: _kept(directory, partial, num_variants, len(examples))))
    ):
        losses, tokens = np.array(kept["losses"]), np.array(kept["tokens"])
    passes = evaluations / model.config.num_layers
    batches = list(batches_of(examples, batch_size, model, passes=passes) if batches is None else batches)
    left = [(rows, batch) for rows, batch in batches if not _done(losses, rows[rows < len(examples)])]
    saved = time.monotonic()

    def save() -> None:
        if directory is None:
            return
        meta = {"format": _KEPT.format, "format_version": 1, "identity": directory.identity}
        write_npz(directory.path / partial, {"losses": losses, "tokens": tokens}, meta)

    whole = {"total": len(batches) * evaluations, "initial": (len(batches) - len(left)) * evaluations}
    try:
        with bar(progress, **whole, desc="layers", unit=" block evaluations") as shown:

            def do(item: tuple[np.ndarray, Any]) -> None:
                nonlocal saved
                rows, batch = item
                sums, counts = take(batch, rows, shown.update)
                real = rows < len(examples)
                losses[:, rows[real]] = sums[:, real].astype(np.float64) / counts[real]
                tokens[rows[real]] = counts[real]
                if time.monotonic() - saved > _SAVE_SECONDS:
                    save()
                    saved = time.monotonic()

            one_by_one(left, do, lambda number: f"at batch {number} of {len(left)}")
    finally:
        if np.isfinite(losses).any():
            save()
    return losses, tokens, len(batches)


def batches_of(
    examples: Sequence[Example],
    batch_size: int,
    model: Model,
    *,
    passes: float = 1,
    beside: Sequence[str] = (),
    numbered: bool = False,
) -> Iterator[tuple[np.ndarray, TokenBatch]]:
    """Batches on the mesh, each with the places of its rows among N; N for a row that fills up.

    Those of one shape run the head on equally many positions: one compile.

    Args:
        examples: N rows.
        batch_size: rows per batch; rounded up to what divides over the mesh.
        model: model, on its mesh.
        passes: how often the blocks run on each batch.
        beside: names of rows beside these that come with them.
        numbered: whether the rows' places come with them too, for what draws at random.
    """
    others = Steps(examples, batch_size, -1, beside=beside).beside if beside else {}
    batches = make_batches(examples, model.budget(batch_size, passes=passes), prompt_only=False)
    masks, scored = [response_mask(batch, examples) for batch in batches], collections.Counter[tuple[int, ...]]()
    for mask in masks:
        scored[mask.shape] = max(scored[mask.shape], most_scored(mask, model.mesh))
    for batch, mask in zip(batches, masks, strict=True):
        further = {name: token_batch(rows.of(batch.rows), fixed=rows, mesh=model.mesh) for name, rows in others.items()}
        found = TokenBatch(
            batch.tokens, batch.lengths, mask, scored[mask.shape], further, batch.rows if numbered else None
        )
        yield batch.rows, place(found, model.mesh)


class GrowingRows:
    """Rows by key, as a run makes them; where it writes, in a file that grows too: what is there is not made again.

    Attributes:
        rows: rows by key.
    """

    def __init__(
        self,
        part: Path | None,
        key: Callable[[dict[str, Any]], Any],
        kind: Any = dict[str, Any],
        whole: Path | None = None,
    ):
        """Reads what an earlier run has left.

        Args:
            part: file that grows; None keeps nothing.
            key: key of a row.
            kind: declaration (`jaxcrit.core.schema`) of a row.
            whole: file that a complete run has left in its place.
        """
        self._key, self._part = key, part
        self.rows: dict[Any, dict[str, Any]] = {}
        if part is not None:
            files = [file for file in (part, whole) if file is not None]
            kept = processes.share(lambda: [row for file in files for row in read_lines(file, kind)])
            self.rows, self._text = {key(row): row for row in kept}, GrowingText(part)
            self._text.start(json_lines(self.rows.values()))  # whole lines only, whatever an interruption left

    def lacks(self, keys: Iterable[Any]) -> bool:
        """Whether a row of these keys is still to make."""
        return any(key not in self.rows for key in keys)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keeps some more rows."""
        self.rows |= {self._key(row): row for row in rows}
        if self._part is not None and rows:
            self._text.append(json_lines(rows))

    def flush(self) -> None:
        """Returns when all of them are in the file."""
        if self._part is not None:
            self._text.flush()

    def forget(self) -> None:
        """Removes the file."""
        if self._part is not None and processes.first():
            self._part.unlink(missing_ok=True)


class SweepMetaRequired(TypedDict):
    """What a report of a sweep takes from a score's meta."""

    unchanged: float
    num_samples: Count


class SweepMeta(SweepMetaRequired, total=False):
    """With what it takes from that of right answers, and of gains."""

    p_holm: list[float]
    chance: list[float]
    gain: float


def read_back(out: Path, meta: Any = SweepMeta) -> dict[str, LayerScores]:
    """The scores of a run that is complete already.

    Args:
        out: run directory.
        meta: declaration (`jaxcrit.core.schema`) of what a report takes from their meta.

    Raises:
        UserError: the file is damaged.
    """
    file = out / "scores.json"

    def look() -> dict[str, Any]:
        found = read_scores(file)
        for key, score in found.items():
            conform(score.meta, meta, str(file), DAMAGED, f"{key}.meta")
            if not score.valid.any():
                raise UserError(f"{file}: expected {key} to be valid in a layer; {DAMAGED}")
        return {key: score.to_json() for key, score in found.items()}

    return {key: LayerScores.from_json(key, entry) for key, entry in processes.share(look).items()}


def write_scored(out: Path, scores: Mapping[str, LayerScores]) -> None:
    """Writes ``scores.json``, and ``deletions.npz`` of the same samples beside it."""
    write_scores(out / "scores.json", scores)
    left = {key: score.deletions for key, score in scores.items() if score.deletions is not None}
    ids = next(iter(left.values())).sample_ids
    write_deletions(out, {key: one.values for key, one in left.items()}, ids)


def _kept(directory: RunDirectory, partial: str, variants: int, samples: int) -> dict[str, Any]:
    """What an earlier run of this identity has left, as JSON values; empty where nothing."""
    file = directory.path / partial
    if not file.exists():
        return {}
    arrays, meta = read_npz(file, _KEPT, V=variants, N=samples)
    return {name: array.tolist() for name, array in arrays.items()} if meta["identity"] == directory.identity else {}


def _done(losses: np.ndarray, rows: np.ndarray) -> bool:
    return bool(np.isfinite(losses[:, rows]).all())
