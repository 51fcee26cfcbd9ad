"""``jaxcrit select``: chooses layers from the scores of an earlier run, and says and checks it in others' words.

It loads no model; jax alone to check a file, for the shapes of a model's tensors.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from jaxcrit.commands import shared
from jaxcrit.core import console
from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.files import as_path, write_text
from jaxcrit.core.groups import BY_HASH, SELECTION, WHERE
from jaxcrit.core.layers import LayerScores, LayerSet, read_scores, score_of
from jaxcrit.core.options import Options, option
from jaxcrit.core.selections import LayerSpec, resolve
from jaxcrit.reporting.exporters import LINEARS, Asked, export_selection, format_of
from jaxcrit.reporting.matchers import peft_version
from jaxcrit.reporting.readback import ReadBack, read_back, understood
from jaxcrit.reporting.tensors import Tensors

DIFFERS = 1  # exit code: the other trainer would train something else


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectOptions(Options, title="what"):
    """What ``jaxcrit select`` is asked."""

    scores: str = option("", "scores.json of an analysis", word="FILE", free=BY_HASH)
    layers: str = option("critical", SELECTION, word="SPEC")
    recipe: str = option("", "as a paper did: liu2025, ogawa2026, spectrum, ... (:K)", word="NAME[:K]")
    criterion: str = option("delta_debiased", "score to choose by", word="KEY")
    trim: int = option(2, "layers at each end that are never critical", lowest=0)
    model: str = option("", "whose layers and tensors: its config.json is enough", word="DIR", free=BY_HASH)
    format: str = option(
        "", "peft, axolotl, swift, ... (default: json): docs/interchange.md", word="FORMAT", group="result"
    )
    checked: str = option(
        "",
        "tell what another trainer would train by this file",
        word="FILE",
        free=BY_HASH,
        group="result",
        name="check",
    )
    lora_rank: int = option(8, "rank of adapters; alpha is twice that", lowest=1, group="result")
    rest_rank: int = option(0, "peft: rank on the other layers; 0 for none", lowest=0, group="result")
    lora_targets: str = option("", "adapters on some of q,k,v,o,gate,up,down", word="NAMES", group="result")
    out: str = option(
        "", "file to write: the selection, or all tensors of --check", word="FILE", free=WHERE, group="result"
    )

    @property
    def targets(self) -> tuple[str, ...]:
        """`lora_targets` as names.

        Raises:
            UserError: one that there is not.
        """
        names = tuple(filter(None, self.lora_targets.split(",")))
        if strange := [name for name in names if name not in LINEARS]:
            raise UserError(
                f"--lora_targets={self.lora_targets}: no {strange[0]!r}; expected some of {','.join(LINEARS)}"
            )
        return names


OPTIONS = SelectOptions


def run(options: SelectOptions) -> int:
    """Chooses; prints or writes the selection, or reads another trainer's file and compares."""
    if options.format:
        format_of(options.format)
    targets = options.targets
    if options.checked and not options.model:
        raise UserError(f"--check={options.checked}: expected --model=DIR too, whose tensors it names (a config.json)")
    scores = read_scores(options.scores) if options.scores else {}
    tensors = None
    if options.model:
        from jaxcrit.models.shapes import config_of

        tensors = Tensors.of_model(config_of(options.model))
    chosen, family = _chosen(options, scores, tensors)
    asked = Asked(options.model or "MODEL", family, tensors, options.lora_rank, options.rest_rank, targets)
    if options.checked:
        found = read_back(options.checked, options.format, chosen, asked)
        return _compared(options, found, chosen)
    text = export_selection(chosen, options.format or "json", asked=asked)
    if tensors is not None:
        told = understood(text, options.format or "json", chosen, asked, f"--format={options.format}").differing
        if told:
            why = f"{listed(list(told), 3)} would differ; take another format"
            raise UserError(f"--format={options.format}: cannot say {chosen}: {why}")
    if options.out:
        _write(options.out, text)
    else:
        sys.stdout.write(text)
    console.note(str(chosen))
    if options.out:
        shared.tell_next("select", options, options.out)
    return 0


def _chosen(
    options: SelectOptions, scores: dict[str, LayerScores], tensors: Tensors | None
) -> tuple[LayerSet, str | None]:
    """The layers, and the type of the model they are of."""
    spec = LayerSpec.parse(options.layers)
    if not scores and (tensors is None or (spec.needs_scores and not options.recipe)):
        raise UserError("select: expected --scores=FILE, the scores.json that jaxcrit analyze wrote")
    depth = next(iter(scores.values())).num_layers if scores else tensors.num_layers if tensors else 0
    if tensors is not None and tensors.num_layers != depth:
        raise UserError(f"--model={options.model}: has {tensors.num_layers} layers, but the scores are of {depth}")
    key = spec.score_key or options.criterion
    meta = score_of(scores, key, options.scores).meta if scores and not options.recipe else {}
    if options.recipe:
        from jaxcrit.selection.recipes import by_recipe, lint

        if options.layers != "critical":
            raise UserError(f"--recipe={options.recipe} --layers={options.layers}: give one of them")
        meta = next((score.meta for score in scores.values()), {})
        hint = f"; {'score' if scores else 'give --scores=FILE, or score'} the model first: jaxcrit analyze or score"
        recipe, chosen = by_recipe(options.recipe, scores, depth, model_hash=meta.get("model_hash"), hint=hint)
        console.note(f"{recipe.source}; layers to {recipe.use}")
        for line in lint(recipe, scores, chosen):
            console.note(f"look out: {line}")
        if options.format and (format_of(options.format).verb == "stay") != (recipe.use == "leave out"):
            console.note(f"look out: these are layers to {recipe.use}, which --format={options.format} does not do")
    else:
        identity = meta.get("model_hash")
        chosen = resolve(spec, depth, scores=scores or None, criterion=key, trim=options.trim, model_hash=identity)
    return chosen, tensors.family if tensors else meta.get("model_type")


def _compared(options: SelectOptions, found: ReadBack, chosen: LayerSet) -> int:
    """Prints what a file says, and where that is not the selection."""
    own = peft_version() if "peft" in found.format.tool else ""
    with_own = f", matched by peft {own} itself" if own else ""
    console.tell(f"{options.checked} by the rules of {found.format.tool}{with_own}:")
    for line in found.lines():
        console.tell(f"  {line}")
    if options.out:
        _write(options.out, "".join(f"{name}\t{size}\n" for name, size in found.trained.items()))
    if found.differing:
        console.tell(f"{options.checked}: not {chosen}: {len(found.differing)} tensors differ")
        return DIFFERS
    console.tell(f"{options.checked}: exactly {chosen}")
    return 0


def _write(out: str, text: str) -> None:
    path: Path = as_path(out)
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written ({error.strerror})") from None
