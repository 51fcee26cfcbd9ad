"""``jaxcrit correlate``: whether two scores of the layers agree, honestly."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcrit.commands import shared
from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.files import as_path, inside, plain, write_json
from jaxcrit.core.groups import BY_HASH, WHERE
from jaxcrit.core.hashing import sha256_json
from jaxcrit.core.layers import LayerScores, read_scores, score_of
from jaxcrit.core.options import Options, option
from jaxcrit.core.run import Facts, running
from jaxcrit.reporting.tables import number, p_value, parted, said, shortened, table, wide_table

if TYPE_CHECKING:
    from jaxcrit.reporting.report import Report
    from jaxcrit.selection.correlation import Correlation

CORRELATION_FORMAT = "jaxcrit.correlation"
_FIRST_CHOICE = "delta_debiased"
_STRONGEST, _SHOWN = 12, 14  # pairs that are listed; scores whose whole matrix the terminal shows
CAVEATS = (
    "Neighbouring layers are alike, so that layers are fewer independent observations than they are layers: read the"
    " circular-shift p, not the naive one.",
    "Scores that both drift with depth correlate whatever else they measure: read the correlation given depth.",
    "The interval says how the correlation would change with other prompts of the same kind, not with other layers or"
    " another model.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorrelateOptions(Options, title="what"):
    """What ``jaxcrit correlate`` is asked."""

    scores: tuple[str, ...] = option((), "scores.json to compare; give it twice", word="FILE[:KEY]", free=BY_HASH)
    all: str = option("", "instead: every score in a folder against every other", word="DIR", free=BY_HASH)
    out: str = option("", "directory for pictures and report (default: none)", word="DIR", free=WHERE)
    block: int = option(0, "layers to a block; 0 for twice the wider window", lowest=0, group="tests")
    seed: int = option(0, "seed of permutations and interval", lowest=0, group="tests")
    circular: bool = option(False, "even if one score chose what was trained for the other", group="tests")


OPTIONS = CorrelateOptions


@dataclasses.dataclass(frozen=True, eq=False)
class Correlated:
    """What came out.

    Attributes:
        names: names of the M scores, as ``FOLDER:KEY``.
        scores: the M scores.
        spearman: ``[M, M]``, scores of direction ``high`` turned round; NaN where a pair has nothing to compare.
        pair: all about the two; None for a folder.
        p_shift: ``[M, M]`` circular-shift p of every two; None for a pair.
        warnings: what would mislead a reader.
        out: run directory; None where none was asked for.
    """

    names: list[str]
    scores: list[LayerScores]
    spearman: np.ndarray
    pair: Correlation | None
    p_shift: np.ndarray | None
    warnings: list[str]
    out: Path | None


def run(options: CorrelateOptions) -> int:
    """Correlates, draws where asked, prints."""
    found = run_correlate(options)
    return shared.tell(report(found), found.out)


def run_correlate(options: CorrelateOptions) -> Correlated:
    """Correlates two scores, or every two of a folder; writes ``correlation.json`` and a report where asked.

    Raises:
        UserError: not two scores, no such file or key, nothing to compare, or a directory that cannot be written.
    """
    from jaxcrit.selection.cautions import correlation_cautions
    from jaxcrit.selection.correlation import circle, correlate, spearman_matrix

    if bool(options.scores) == bool(options.all):
        raise UserError("correlate: expected --scores=FILE[:KEY] twice, or --all=DIR, one of them")
    pair, warnings = None, []
    if options.all:
        read = _everything(as_path(options.all))
    elif len(options.scores) == 2:
        read = [_read(text) for text in options.scores]
    else:
        raise UserError(f"correlate: expected --scores=FILE[:KEY] twice, got it {len(options.scores)} times")
    names, scores = _short(read), [score for _, score in read]
    if not options.all:
        pair = correlate(*scores, block=options.block or None, seed=options.seed, circular=options.circular)
        warnings = correlation_cautions(pair, names, scores)
    matrix = spearman_matrix(scores)
    if options.all and not options.circular:
        circles = [(i, j) for i, a in enumerate(scores) for j, b in enumerate(scores) if circle(a, b)]
        for pair_of in circles:
            matrix[pair_of] = np.nan
        if circles:
            warnings.append(
                f"{len(circles) // 2} pairs are left out: one score chose the layers whose training the other measures"
                " (--circular shows them)"
            )
    datasets = [
        Facts(name, {"num_samples": score.num_layers, "hash": sha256_json(score.to_json())})
        for name, score in zip(names, scores, strict=True)
    ]
    with running("correlate", options, models={}, datasets=datasets, keep=bool(options.out)) as run:
        p_shift = None if pair is not None else _shifts(scores, matrix)
        found = Correlated(names, scores, matrix, pair, p_shift, warnings, run.out)
        if found.out is not None:
            content: dict[str, Any] = {"scores": names, "spearman": plain(matrix.tolist())}
            if p_shift is not None:
                content["p_shift"] = plain(p_shift.tolist())
            if pair is not None:
                content |= {"pair": plain(dataclasses.asdict(pair)), "warnings": warnings}
            write_json(found.out / "correlation.json", CORRELATION_FORMAT, content)
            report(found).write(found.out, run.record)
    return found


def _shifts(scores: Sequence[LayerScores], matrix: np.ndarray) -> np.ndarray:
    """Circular-shift p of every two scores that have a correlation."""
    from jaxcrit.selection.correlation import circular_shift_p

    found = np.full_like(matrix, np.nan)
    for i, j in itertools.combinations(range(len(scores)), 2):
        if np.isfinite(matrix[i, j]):
            found[i, j] = found[j, i] = circular_shift_p(scores[i].values, scores[j].values)
    return found


def _read(text: str) -> tuple[Path, LayerScores]:
    """``FILE[:KEY]``, the key being `_FIRST_CHOICE` or else the first in the file."""
    path, key = as_path(text), ""
    if not path.exists() and ":" in text:
        name, _, key = text.rpartition(":")
        path = as_path(name)
    path = inside(path, "scores.json")
    scores = read_scores(path, deletions=True)
    key = key or (_FIRST_CHOICE if _FIRST_CHOICE in scores else next(iter(scores)))
    return path, score_of(scores, key, path)


def _everything(folder: Path) -> list[tuple[Path, LayerScores]]:
    """Every score of every scores.json in and below a folder."""
    if not folder.is_dir():
        raise UserError(f"--all={folder}: expected a directory")
    files = sorted(folder.rglob("scores.json"))
    found = [(path, score) for path in files for score in read_scores(path).values()]
    if len(found) < 2:
        raise UserError(f"--all={folder}: expected at least 2 scores in the scores.json below it, got {len(found)}")
    layers = {score.num_layers: path for path, score in found}
    if len(layers) > 1:
        each = listed([f"{count} layers in {path}" for count, path in sorted(layers.items())])
        raise UserError(f"--all={folder}: expected scores of one model, got {each}")
    return found


def _short(read: Sequence[tuple[Path, LayerScores]]) -> list[str]:
    """``FOLDER:KEY``, folders named from where they part; the key alone where all are of one folder."""
    named = parted([path.parent for path, _ in read])
    return [f"{folder}:{one.name}" if folder else one.name for folder, (_, one) in zip(named, read, strict=True)]


def pair_table(pair: Correlation, names: Sequence[str]) -> str:
    """One row per statistic: its value, its p, and what the p takes for granted."""
    interval = "not available" if pair.interval is None else " to ".join(number(end, 3) for end in pair.interval)
    depth = zip("AB", pair.depth, names, strict=True)
    rows = [
        ["Spearman ρ", number(pair.rho, 3), p_value(pair.p_naive), "naive: as if layers were independent"],
        ["", "", p_value(pair.p_shift), f"all circular shifts; never below 1/{pair.num_layers}"],
        ["", "", p_value(pair.p_block), f"permuted blocks of {pair.block} layers"],
        ["Kendall τ", number(pair.tau, 3), "", ""],
        ["ρ given depth", number(pair.partial, 3), p_value(pair.p_partial), "circular shifts of what depth leaves"],
        *([f"ρ of {side} with depth", number(rho, 3), "", name] for side, rho, name in depth),
        ["smallest ρ", number(pair.smallest, 3), "0.05", f"significant of {pair.num_layers} independent layers"],
    ]
    return f"{table(['', 'value', 'p', ''], rows)}\n95 % interval of ρ over the samples: {interval}"


def matrix_table(names: Sequence[str], matrix: np.ndarray) -> str:
    """Spearman's ρ of every two scores; columns by number, in as many parts as the width takes."""
    longest = min(40, max(map(len, names)))
    short = [_end(name, longest) for name in names]
    columns = {str(place): [number(rho, 2) for rho in column] for place, column in enumerate(matrix.T, 1)}
    return wide_table(["", *columns], columns, ["", *short], margin=longest + 4, least=5)


def strongest_table(found: Correlated, kept: Sequence[int]) -> str:
    """The pairs of different criteria that correlate most, with their p, and how many would come by chance."""
    assert found.p_shift is not None
    pairs = _pairs(found, kept)
    order = sorted(pairs, key=lambda pair: -abs(found.spearman[pair]))
    rows = [
        [
            number(found.spearman[pair], 2),
            p_value(found.p_shift[pair]),
            shortened(" and ".join(found.names[k] for k in pair), 80),
        ]
        for pair in order[:_STRONGEST]
    ]
    small = sum(found.p_shift[pair] <= 0.05 for pair in pairs)
    return (
        f"{table(['ρ', 'shift p', 'strongest'], rows)}\n"
        f"{small} of {len(pairs)} pairs have p of 0.05 or less; {0.05 * len(pairs):.1f} would by chance"
    )


def _pairs(found: Correlated, kept: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs that have a correlation; one criterion on two datasets, or in the mean of them, is no pair of two."""
    keys = [name.rpartition(":")[2] for name in found.names]
    return [
        (i, j) for i, j in itertools.combinations(kept, 2) if keys[i] != keys[j] and np.isfinite(found.spearman[i, j])
    ]


def _headline(found: Correlated, kept: Sequence[int]) -> str:
    """How far the scores of a folder agree, in one sentence."""
    pairs = [found.spearman[pair] for pair in _pairs(found, kept)]
    if not pairs:
        return f"All {len(found.names)} scores rank the layers alike, or have nothing to compare."
    middle = float(np.median(pairs))
    said = "mostly agree" if middle > 0.5 else "agree little" if middle > -0.2 else "mostly disagree"
    return f"The {len(kept)} scores that differ {said} on which layers are critical: median ρ {middle:+.2f}."


def _all_report(found: Correlated) -> Report:
    """The matrix of a folder: scores that are nearly one folded, p beside ρ."""
    from jaxcrit.reporting import plots
    from jaxcrit.reporting.report import Figure, Report, Section, on_axes
    from jaxcrit.selection.correlation import ALIKE, near_duplicates

    stands = near_duplicates(found.spearman)
    kept = [place for place in range(len(found.names)) if place not in stands]
    names, matrix = [found.names[place] for place in kept], found.spearman[np.ix_(kept, kept)]
    folded: dict[int, list[str]] = {}
    for place, other in stands.items():
        folded.setdefault(other, []).append(found.names[place])
    told = [f"{found.names[other]} stands for {', '.join(same)}" for other, same in folded.items()]
    shown = [_end(name, 26) for name in names]
    draw, left = on_axes(plots.rank_heatmap, shown, matrix), 0.6 + 0.065 * max(map(len, shown))
    what = "Spearman's ρ of every two scores; rows and columns by number."
    figure = Figure("matrix.png", draw, what, (6.2, 5.2), left)
    strongest, whole = strongest_table(found, kept), matrix_table(names, matrix)
    sections = [
        Section(
            "Strongest pairs of two criteria",
            "p of all circular shifts, not corrected for how many pairs there are",
            strongest,
        ),
        Section("Every two scores", "", whole, [figure], None if len(names) <= _SHOWN else ""),
    ]
    if told:
        note = f"scores that correlate with ρ of {ALIKE} or more are one row"
        sections.append(Section("Folded", note, "\n".join(told), (), "" if len(told) > _STRONGEST else None))
    turned = "Scores whose high values are critical are turned round, so that 1 always means agreement."
    return Report([_headline(found, kept), turned], found.warnings, sections, CAVEATS)


def _end(name: str, longest: int) -> str:
    return name if len(name) <= longest else f"…{name[1 - longest :]}"


def report(found: Correlated) -> Report:
    """The statistics of a pair, or the matrix of a folder."""
    from jaxcrit.reporting import plots
    from jaxcrit.reporting.report import Figure, Report, Section, on_axes
    from jaxcrit.selection.correlation import meaning

    pair, names = found.pair, found.names
    if pair is None:
        return _all_report(found)
    a, b = found.scores
    layers = f"{pair.num_layers} layers ({pair.first} to {pair.last} of {a.num_layers})"
    told = [meaning(pair, found.scores, names), f"A {names[0]} against B {names[1]}, {layers}"]
    axes = [said(name) for name in names]
    figures = [
        Figure(
            "layers.png",
            lambda canvas: plots.stacked_curves(a, b, axes, canvas),
            "Both scores over the layers, each on a scale of its own.",
            (6.2, 5.0),
        ),
        Figure("scatter.png", on_axes(plots.score_scatter, a, b, axes), "Each layer by both scores.", (5.2, 4.8)),
    ]
    return Report(told, found.warnings, [Section("Correlation", "", pair_table(pair, names), figures)], CAVEATS)
