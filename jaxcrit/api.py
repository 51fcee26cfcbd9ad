"""The Python API: what a notebook calls. `jaxcrit` itself gives these names, lazily.

Functions take a `Model`, or the name of one; rows as files, dicts, prompts or token ids; layers as a selection such as
``critical:3``. They write nothing unless ``out`` is given, and their errors name arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jaxcrit.commands.ablate import ablate
from jaxcrit.commands.edit import edit
from jaxcrit.commands.export import export
from jaxcrit.commands.finetune import finetune
from jaxcrit.commands.generate import generate
from jaxcrit.commands.prune import prune
from jaxcrit.commands.remix import remix
from jaxcrit.commands.reuse import reuse
from jaxcrit.commands.screen import screen
from jaxcrit.commands.shared import opened, options_for, public
from jaxcrit.commands.substitute import substitute
from jaxcrit.commands.trace import trace
from jaxcrit.core.deletions import Deletions
from jaxcrit.core.digests import check
from jaxcrit.core.errors import UserError, did_you_mean
from jaxcrit.core.files import as_path, read_npz
from jaxcrit.core.layers import LayerScores, LayerSet, read_scores
from jaxcrit.core.options import from_values, options_of
from jaxcrit.core.rundir import read_record
from jaxcrit.core.selections import LayerSpec, resolve

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from jaxcrit.evidence.states import HiddenStates
    from jaxcrit.models.model import Bars, Model
    from jaxcrit.selection.correlation import Correlation

__all__ = [
    "FinishedRun",
    "Scores",
    "ablate",
    "capture",
    "cka",
    "compare",
    "correlate",
    "edit",
    "export",
    "finetune",
    "generate",
    "inspect",
    "load",
    "open_run",
    "plot",
    "prune",
    "remix",
    "reuse",
    "score",
    "screen",
    "select",
    "states",
    "substitute",
    "trace",
]


@dataclasses.dataclass(frozen=True, eq=False)
class Scores(Mapping[str, LayerScores]):
    """Scores of every layer by key.

    Attributes:
        scores: score by key.
        warnings: what would mislead a reader.
    """

    scores: Mapping[str, LayerScores]
    warnings: Sequence[str] = ()

    def __getitem__(self, key: str) -> LayerScores:
        if key not in self.scores:
            raise UserError(f"no score {key!r}{did_you_mean(key, self.scores)}; there are {', '.join(self.scores)}")
        return self.scores[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def table(self) -> str:
        """One row per layer, a column per score with the direction that is critical under its name."""
        from jaxcrit.commands.score import beside, score_table

        return "\n".join([score_table(self.scores), *beside(self.scores)])

    def to_pandas(self) -> pandas.DataFrame:
        """A table indexed by layer: a column per score, and ``KEY_stderr`` where it has errors. Needs pandas."""
        import pandas

        columns: dict[str, np.ndarray] = {}
        for key, one in self.scores.items():
            columns[key] = np.where(one.valid, one.values, np.nan)
            if one.stderr is not None:
                columns[f"{key}_stderr"] = one.stderr
        return pandas.DataFrame(columns).rename_axis("layer")

    def __str__(self) -> str:
        return self.table()


@public
def load(model: str | Path | Model = "", *, mesh: str = "", dtype: str = "", step: str = "") -> Model:
    """Opens a model. Its weights are read when they are first needed, once.

    Args:
        model: checkpoint directory, GGUF file, hub id, LoRA directory of PEFT (``ADAPTER@BASE`` names its base too), or
            run of ``jaxcrit finetune``; empty for the embedded model.
        mesh: devices by axis, such as ``data=4,fsdp=2``; empty goes by the model's size.
        dtype: ``float32`` or ``bfloat16``; empty for float32 on CPU, else as the file has it.
        step: which checkpoint of a run: a number, ``best`` or ``last``; empty for where training ended.

    Raises:
        UserError: there is no such model, or it cannot be read.

    Example:
        >>> import jaxcrit as jc
        >>> jc.load().config.num_layers
        16
    """
    from jaxcrit.models.model import open_model

    return open_model(model, mesh=mesh, dtype=dtype, step=step)


@public
def capture(
    model: str | Path | Model = "",
    rows: Any = None,
    *,
    position: Literal["last", "mean", "all"] = "last",
    batch_size: int = 8,
    precision: str = "highest",
    progress: Bars | None = None,
    **options: Any,
) -> HiddenStates:
    """Runs prompts through a model once and keeps what leaves every block.

    Args:
        model: a `Model`, or the name of one, as `load` takes it.
        rows: prompts: text as ``--data`` has it, a path, dicts, strings, or token ids; None for the embedded prompts.
            One dataset.
        position: token that stands for a prompt: the ``last``, the ``mean`` of all, or ``all`` as samples of their own.
        batch_size: prompts per forward pass.
        precision: precision of matrix products.
        progress: maker of progress bars (tqdm's signature); None for silence.
        **options: fields of `RowOptions`: ``limit``, ``template``, ...

    Raises:
        UserError: rows that cannot be read or do not fit; several datasets.

    Example:
        >>> import jaxcrit as jc
        >>> found = jc.capture(jc.load(), ["What is 2+2?", "Name a color.", "Say hi.", "Spell cat.", "Is ice cold?"])
        >>> found.hidden.shape
        (16, 5, 96)
    """
    from jaxcrit.core.groups import AnalyzeOptions
    from jaxcrit.evidence.captures import Captures

    given = {**options, "position": position, "batch_size": batch_size, "precision": precision}
    asked = options_for(AnalyzeOptions, "", given)
    of = opened(asked, model)
    (dataset,) = _one(of.read(asked, rows))
    return Captures(asked, of, [dataset], None, progress).states(dataset)[0]


@public
def states(
    array: Any,
    *,
    axes: str = "",
    ends: str = "",
    sample_ids: Sequence[str] | None = None,
    units: Sequence[int] | None = None,
    model_hash: str | None = None,
    position: Literal["last", "mean", "all"] = "last",
) -> HiddenStates:
    """Hidden states from any engine, an array or a file; nothing is guessed.

    Args:
        array: array of three axes, or the path of a file or directory, see `read_states`.
        axes: what its axes are, in order: ``lnd`` or ``nld``; empty for a file that says so itself.
        ends: what its layers are, see `states_from`; empty for a file that says so, and for what leaves each
            block of an array.
        sample_ids: identity of each sample.
        units: which prompt each sample comes from, where several samples come from one.
        model_hash: identity of the model, where it is known.
        position: token that stands for a prompt, where a file holds all of them.

    Raises:
        UserError: see `states_from` and `read_states`.

    Example:
        >>> import numpy as np
        >>> import jaxcrit as jc
        >>> array = np.random.default_rng(0).standard_normal((20, 6, 8))
        >>> jc.states(array, axes="nld").hidden.shape
        (6, 20, 8)
    """
    from jaxcrit.evidence.states import states_from
    from jaxcrit.evidence.states_files import read_states

    known: dict[str, Any] = {"sample_ids": sample_ids, "units": units, "model_hash": model_hash}
    if isinstance(array, str | Path):
        return read_states(array, axes=axes, ends=ends, position=position, **known)
    return states_from(array, axes=axes, ends=ends or "blocks", **known)


@public
def score(
    what: str | Path | Model | HiddenStates = "",
    rows: Any = None,
    *,
    criteria: str | Sequence[str] = "",
    window: int = 5,
    include_self: bool = True,
    kernel: Literal["linear", "rbf"] = "linear",
    out: str | Path = "",
    progress: Bars | None = None,
    **options: Any,
) -> Scores:
    """Scores every layer: states by δ and step, a model by other criteria.

    Args:
        what: `HiddenStates`, scored by ``delta``, ``delta_debiased``, ``step`` and ``step_debiased``; or a model,
            scored by the other criteria of docs/criteria.md.
        rows: rows that a model runs on; None for the embedded ones.
        criteria: keys of criteria of a model; empty for all but perturbations.
        window: layers that δ of states averages over; odd.
        include_self: whether a layer of states counts in its own window.
        kernel: kernel of CKA of states.
        out: run directory, for a model; empty writes nothing.
        progress: maker of progress bars (tqdm's signature); None for silence.
        **options: of a model, fields of `ScoreOptions`; and by its name a dict of the options of one criterion, such as
            ``cluster_nmi={"clusters": 20}``.

    Returns:
        Scores by key, with standard errors where they can be had.

    Raises:
        UserError: states that nothing can be computed from, an unknown criterion, or a mistake in options or rows.

    Example:
        >>> import numpy as np
        >>> import jaxcrit as jc
        >>> array = np.random.default_rng(0).standard_normal((8, 30, 12))
        >>> sorted(jc.score(jc.states(array, axes="lnd")))
        ['delta', 'delta_debiased', 'step', 'step_debiased']
    """
    from jaxcrit.evidence.states import HiddenStates

    if isinstance(what, HiddenStates):
        asked = {"criteria": bool(criteria), "rows": rows is not None, "out": bool(out), **dict.fromkeys(options, True)}
        if given := [name for name, wanted in asked.items() if wanted]:
            raise UserError(f"--{' --'.join(given)}: needs a model; states have δ and step alone")
        return _score_states(what, window, include_self, kernel)
    from jaxcrit.commands.score import ScoreOptions, run_score
    from jaxcrit.criteria.registry import own_options

    own = []
    for kind in own_options():
        given = options.pop(kind.key, {})
        if not isinstance(given, Mapping):
            example = next(iter(options_of(kind))).field
            raise UserError(f"{kind.key}={given!r}: expected a dict, such as {kind.key}={{{example!r}: ...}}")
        named = {f"{kind.key}.{name}": value for name, value in given.items()}
        own.append(from_values(kind, named, "options"))
    asked = options_for(ScoreOptions, out, {**options, "criteria": criteria})
    found = run_score(asked, own, model=what, rows=rows, progress=progress, keep=bool(out))
    return Scores(found.scores, found.warnings)


def _score_states(found: HiddenStates, window: int, include_self: bool, kernel: Any) -> Scores:
    from jaxcrit.criteria.delta import curves
    from jaxcrit.similarity import RESIDENT_SAMPLES, centred_grams, gram_tables, tiled

    if window < 3 or window % 2 == 0:
        raise UserError(f"--window={window}: expected an odd number, 3 or more (a layer and its neighbours)")
    whole = found.num_samples <= RESIDENT_SAMPLES or found.units is not None or kernel != "linear"
    grams = centred_grams(found.hidden, kernel, allow_repeats=found.units is not None) if whole else None
    tables = tiled(found.hidden) if grams is None else gram_tables(grams)
    shape: dict[str, Any] = {"window": window, "include_self": include_self}
    scores, kept = curves(tables, grams, found.units, **shape, meta=found.meta)
    left = {key: Deletions(values, found.prompt_ids) for key, values in kept.items()}
    scores = {key: dataclasses.replace(one, deletions=left.get(key)) for key, one in scores.items()}
    return Scores(found.trusted(scores), found.notes)


@public
def select(
    scores: Mapping[str, LayerScores] | LayerScores,
    layers: str = "critical",
    *,
    criterion: str = "delta_debiased",
    trim: int = 2,
) -> LayerSet:
    """Chooses layers by their scores.

    Args:
        scores: `Scores`, or one score.
        layers: selection such as ``critical:3``, ``KEY:3`` (by any of the scores), ``first:2`` or ``3-5,9``.
        criterion: key of the score that ``critical`` goes by.
        trim: layers at each end that ranked rules never choose.

    Raises:
        UserError: no such score, a selection that is none, or more layers than there are.

    Example:
        >>> import numpy as np
        >>> import jaxcrit as jc
        >>> array = np.random.default_rng(0).standard_normal((8, 30, 12))
        >>> jc.select(jc.score(jc.states(array, axes="lnd")), "first:2").layers
        (0, 1)
    """
    found: Mapping[str, LayerScores] = {scores.name: scores} if isinstance(scores, LayerScores) else scores
    key = scores.name if isinstance(scores, LayerScores) else criterion
    spec = LayerSpec.parse(layers)
    if key not in found and not spec.score_key:
        raise UserError(f"--criterion={key}: expected one of {', '.join(found)}{did_you_mean(key, found)}")
    one = found[key] if key in found else next(iter(found.values()))
    model_hash = one.meta.get("model_hash")
    return resolve(spec, one.num_layers, scores=found, criterion=key, trim=trim, model_hash=model_hash)


@public
def correlate(a: Any, b: Any, *, block: int = 0, seed: int = 0, circular: bool = False) -> Correlation:
    """Correlates two scores of one model over its layers, honestly: see `jaxcrit.selection.correlation.Correlation`.

    Args:
        a: `LayerScores`; or anything with scores of one kind, such as the result of `substitute`.
        b: likewise.
        block: layers to a block of the permutation; 0 for twice the wider window.
        seed: seed of the permutations and the interval.
        circular: accept scores of which one chose the layers whose training the other measures.

    Raises:
        UserError: scores of different models, nothing to rank, or a circle.
    """
    from jaxcrit.selection.correlation import correlate as correlated

    return correlated(_one_score(a), _one_score(b), block=block or None, seed=seed, circular=circular)


def _one_score(given: Any) -> LayerScores:
    if isinstance(given, LayerScores):
        return given
    scores = given if isinstance(given, Mapping) else getattr(given, "scores", None)
    if not isinstance(scores, Mapping) or not scores:
        raise UserError(f"expected scores of the layers, got {type(given).__name__}")
    return next(iter(scores.values()))


@public
def plot(
    scores: Mapping[str, LayerScores] | LayerScores | HiddenStates, layers: LayerSet | None = None, *, title: str = ""
) -> Figure:
    """Draws scores over the layers: δ with its errors where there is δ, else a panel per score.

    Args:
        scores: `Scores`, one score, or `HiddenStates`, of which CKA between all layers is drawn.
        layers: layers to shade.
        title: title of the figure.

    Returns:
        A matplotlib figure, which a notebook shows.
    """
    from jaxcrit.evidence.states import HiddenStates
    from jaxcrit.reporting import plots
    from jaxcrit.similarity import from_tables, sweep

    figure = plots.Drawing(figsize=(6.2, 4.2), layout="constrained")
    if isinstance(scores, HiddenStates):
        tables = sweep(scores.hidden)
        figure.set_size_inches(5.0, 8.6)
        plots.cka_heatmap(from_tables(tables), from_tables(tables, "debiased"), figure)
        return figure
    found = {scores.name: scores} if isinstance(scores, LayerScores) else dict(scores)
    if {"delta", "delta_debiased"} <= found.keys():
        chosen = layers or LayerSet((), "manual", "none", found["delta"].num_layers)
        window = int(found["delta"].meta.get("window", 5))
        plots.delta_curve(found, chosen, figure.subplots(), window=window, title=title)
        return figure
    figure.set_size_inches(6.2, 1.7 * -(-len(found) // 2) + 0.6)
    plots.score_grid(found, figure)
    return figure


@public
def cka(
    hidden: Any,
    *,
    other: Any = None,
    kernel: Literal["linear", "rbf"] = "linear",
    bias: Literal["debiased", "biased"] = "debiased",
) -> np.ndarray:
    """CKA of every layer with every other, debiased unless the paper's biased estimate is asked for.

    Args:
        hidden: `HiddenStates`, or activations ``[L, N, D]``.
        other: the same of a second model on the same samples in the same order; None compares the layers of one.
        kernel: ``linear`` or ``rbf``.
        bias: ``debiased``, near 0 for unrelated layers, or ``biased``.

    Returns:
        ``[L, L]`` float64, or ``[L, L']`` with ``other``.

    Raises:
        UserError: activations that nothing can be computed from.

    Example:
        >>> import numpy as np
        >>> import jaxcrit as jc
        >>> jc.cka(np.random.default_rng(0).standard_normal((3, 20, 8), dtype=np.float32)).shape
        (3, 3)
    """
    from jaxcrit.similarity import cka as similarity

    first, second = (getattr(side, "hidden", side) for side in (hidden, other))
    return similarity(first, other=second, kernel=kernel, bias=bias)


@public
def inspect(model: str | Path | Model = "", rows: Any = None, *, shown: int = 3, **options: Any) -> str:
    """Shows what is read of a model; with rows, what it is given of them: rendered text, what is masked, lengths.

    Args:
        model: a `Model`, or the name of one, as `load` takes it.
        rows: rows, as `Model.read` takes them; None for the model itself.
        shown: rows to show of each dataset.
        **options: with rows, fields of `DataOptions`; without, those of `InspectOptions`.

    Returns:
        The text that ``jaxcrit inspect`` prints; with rows, that of ``jaxcrit data``.

    Raises:
        UserError: a model or rows that cannot be read or rendered.
    """
    if rows is None and "data" not in options:
        from jaxcrit.commands.inspect import InspectOptions, model_text
        from jaxcrit.core.options import from_values

        asked = from_values(InspectOptions, options, "options")
        return model_text(load(model, step=asked.step), asked.template)
    from jaxcrit.commands.data import DataOptions, inspected

    return inspected(options_for(DataOptions, "", options), model, rows, shown)


@public
def compare(a: HiddenStates, b: HiddenStates) -> np.ndarray:
    """Debiased CKA between the layers of two models over the same samples.

    Args:
        a: states of one model.
        b: states of the other, of the same samples.

    Returns:
        ``[L, L']`` float64.

    Raises:
        UserError: the samples are not the same ones in the same order.
    """
    if list(a.sample_ids) != list(b.sample_ids):
        raise UserError("expected states of the same samples in the same order; capture both models on the same rows")
    return cka(a, other=b)


@dataclasses.dataclass(frozen=True, eq=False)
class FinishedRun:
    """A run directory, read back.

    Attributes:
        path: directory.
        record: content of ``run.json``.
        scores: scores by key, empty where the run has none.
        layers: layers chosen; None where none were.
        arrays: arrays of every npz by name of the file, read when they are asked for.
        figures: pictures as PNG bytes by name of the file, read when they are asked for.
    """

    path: Path
    record: Mapping[str, Any]
    scores: Scores
    layers: LayerSet | None

    @property
    def figures(self) -> dict[str, bytes]:
        """Pictures as PNG bytes by name of the file."""
        found = {file: file.read_bytes() for file in sorted(self.path.rglob("*.png"))}
        for file, content in found.items():
            check(file, content)
        return {str(file.relative_to(self.path)): content for file, content in found.items()}

    @property
    def arrays(self) -> dict[str, dict[str, np.ndarray]]:
        """Arrays of every npz by name of the file."""
        found = sorted(self.path.rglob("*.npz"))
        return {str(file.relative_to(self.path)): read_npz(file)[0] for file in found}

    @property
    def tables(self) -> dict[str, str]:
        """Text tables: the scores of the run, and of each of its datasets where there are several."""
        found = sorted(self.path.rglob("scores.json"))
        return {str(file.parent.relative_to(self.path)): Scores(read_scores(file)).table() for file in found}

    def model(self) -> Model:
        """The model that a fine-tuning run ends with.

        Raises:
            UserError: the run is of another command.
        """
        return load(self.path)


@public
def open_run(path: str | Path) -> FinishedRun:
    """Reads a run directory back: scores with what their errors take, layers, tables, figures.

    Args:
        path: directory that a command or a function with ``out`` wrote.

    Raises:
        UserError: it is no run, or a file in it is damaged.
    """
    folder = as_path(path)
    record = read_record(folder)
    found = read_scores(folder / "scores.json", deletions=True) if (folder / "scores.json").exists() else {}
    layers = LayerSet.load(folder / "layers.json") if (folder / "layers.json").exists() else None
    return FinishedRun(folder, record, Scores(found), layers)


def _one(datasets: Sequence[Any]) -> Sequence[Any]:
    if len(datasets) != 1:
        names = ", ".join(dataset.source for dataset in datasets)
        raise UserError(f"expected rows of one dataset, got {len(datasets)} ({names}); name one of them")
    return datasets
