"""The model card of an exported model: its base, layers changed and why, on what data, and what came of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import jaxcrit
from jaxcrit.core.console import visible
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import as_path, read_json, read_lines
from jaxcrit.core.layers import ChosenLayers
from jaxcrit.core.rundir import read_record
from jaxcrit.core.schema import Count, Range
from jaxcrit.models.partition import TrainedRecord
from jaxcrit.training.loop import LossRow

CARD = "README.md"
Share = Annotated[float, Range(0, 1)]
_CITATION = """\
@inproceedings{liu2025spectral,
  title = {Spectral Insights into Data-Oblivious Critical Layers in Large Language Models},
  author = {Liu, Xuyuan and Hsiung, Lei and Yang, Yaoqing and Yan, Yujun},
  booktitle = {Findings of the Association for Computational Linguistics: ACL 2025},
  pages = {4860--4877},
  year = {2025},
  note = {arXiv:2506.00382}
}"""
_LEFT_OUT = ("model", "out", "data", "eval_data", "analysis", "track", "keep", "checkpoint_every", "mesh")


class ConfidenceSet(TypedDict):
    """Of a choice of layers."""

    level: Share
    layers: list[Count]


class Choice(TypedDict):
    """How sure a choice of layers is."""

    num_prompts: Count
    draws: Count
    selection_probability: list[Share]
    confidence_set: ConfidenceSet


class Certain(TypedDict):
    """``uncertainty.json``."""

    choice: Choice


class ChangedRun(TypedDict, total=False):
    """What the card takes from ``run.json``."""

    command: str
    config: dict[str, Any]
    data: dict[str, dict[str, Any]]
    layers: ChosenLayers
    result: dict[str, Any]
    trained: TrainedRecord


def card(name: str, base: str, runs: Sequence[Path | None], *, adapter: bool = False) -> str:
    """The text of a model card, front matter included, as hubs and people read it.

    Args:
        name: heading.
        base: what the checkpoint was called: a hub id, or a directory, of which only the last part is told.
        runs: runs whose changes lie on top of each other, the first at the bottom; None for one made in memory.
        adapter: whether the directory holds adapters alone.

    Raises:
        UserError: a run's record cannot be read.
    """
    on_hub = bool(base) and not Path(base).exists() and base.count("/") == 1
    kind = "adapter" if adapter else "finetune"
    front = [f"base_model: {base}", f"base_model_relation: {kind}"] if on_hub and runs else []
    front += [f"library_name: {'peft' if adapter else 'transformers'}", "tags:", "- jaxcrit"]
    said = f"`{_named(base) or 'the model embedded in jaxcrit'}`"
    lines = ["---", *front, "---", "", f"# {visible(name)}", ""]
    lines += [f"{said} {'with changes on top' if runs else 'as it is'}, written by jaxcrit {jaxcrit.__version__}.", ""]
    for number, run in enumerate(runs, 1):
        lines += _change(number, run)
    if runs:
        lines += ["## Citation", "", "```bibtex", _CITATION, "```"]
    return "\n".join(lines).rstrip() + "\n"


def _change(number: int, run: Path | None) -> Iterator[str]:
    if run is None or not (run / "run.json").is_file():
        what = "made in memory, of which no record was kept" if run is None else f"the adapter `{_named(str(run))}`"
        yield from (f"## Change {number}: {what}", "")
        return
    record = read_record(run, ChangedRun)
    yield from (f"## Change {number}: `jaxcrit {record.get('command', '')}`", "")
    if chosen := record.get("layers"):
        layers = ", ".join(map(str, chosen["layers"]))
        yield f"Layers {layers} of {chosen['num_layers']}, counted from 0, {_reason(run, record, chosen)}"
        if record.get("config", {}).get("mode") == "freeze":
            yield "These are the layers that stayed as they were; all others were trained."
        yield ""
    if trained := record.get("trained"):
        lora, what = trained.get("lora"), "all weights"
        if lora:
            on = ", ".join(map(visible, lora["targets"]))
            what = f"adapters of rank {lora['rank']}, alpha {lora['alpha']:g}, on {on}"
        where = ", ".join([f"layers {', '.join(map(str, trained['layers']))}", *trained["outside"]])
        yield from (f"Changed: {what} of {where}.", "")
    yield from _table(("rows", "number", "source", "sha256 of the rows"), _rows(record))
    tests = [row for row in read_lines(run / "metrics.jsonl", LossRow) if row["kind"] == "eval" and "loss" in row]
    losses = [(f"test loss, nats per response token, step {row['step']}", row["loss"]) for row in tests]
    yield from _table(("result", ""), [*losses[:1], *losses[1:][-1:], *_numbers(record.get("result", {}))])
    told = {key: value for key, value in record.get("config", {}).items() if value not in ("", 0, False, None)}
    options = [f"--{key}={_named(str(value))}" for key, value in told.items() if key not in _LEFT_OUT]
    yield from ("Options:", "", "```", *map(visible, options), "```", "")


def _reason(run: Path, record: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    """What chose the layers, and how sure that is where a score did and its analysis is still there."""
    if chosen["criterion"] == "manual":
        return "named by whoever ran it, not chosen by a score."
    by = f"chosen as `{visible(chosen['rule'])}` by `{visible(chosen['criterion'])}`."
    asked = record.get("config", {}).get("analysis")
    file = (as_path(str(asked)) if asked else run / "analysis") / "uncertainty.json"
    try:
        choice = read_json(file, "jaxcrit.uncertainty", Certain)["choice"]
        each = ", ".join(f"{layer}: {choice['selection_probability'][layer]:.2f}" for layer in chosen["layers"])
    except (UserError, IndexError):
        return f"{by} How sure that choice is was not kept with the run."
    within = ", ".join(map(str, choice["confidence_set"]["layers"]))
    return (
        f"{by} Share of {choice['draws']:,} resamples of {choice['num_prompts']:,} prompts that chose each: {each};"
        f" {100 * choice['confidence_set']['level']:.0f} % confidence set: {within}."
    )


def _rows(record: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    for name, one in record.get("data", {}).items():
        yield name, one.get("num_samples"), _named(str(one.get("source", ""))), str(one.get("hash", ""))[:16]


def _numbers(found: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a result by name, those of its parts behind the part's."""
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{before}{name} ")
        elif isinstance(value, int | float) and not name.endswith(("_bytes", "model_step")):
            yield f"{before}{name}".replace("_", " "), value


def _table(heads: Sequence[str], rows: Iterator[tuple[Any, ...]] | Sequence[tuple[Any, ...]]) -> Iterator[str]:
    rows = list(rows)
    if rows:
        for row in (heads, ["---"] * len(heads), *rows):
            cells = [f"{cell:.6g}" if isinstance(cell, float) else visible(str(cell)) for cell in row]
            yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
        yield ""


def _named(text: str) -> str:
    """Text with the last part alone of each path, as a published card should tell nothing of the machine; URLs stay."""
    return text if "://" in text else re.sub(r"(^|[:,=@])[/~.][^,:=@]*/(?=[^,:=@/])", r"\1", text.rstrip("/"))
