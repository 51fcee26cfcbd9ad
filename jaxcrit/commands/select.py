"""``jaxcrit select``: chooses layers from the scores of an earlier run; loads no model, and no jax."""

from __future__ import annotations

import dataclasses
import sys

from jaxcrit.commands import shared
from jaxcrit.core import console
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import as_path, write_text
from jaxcrit.core.groups import BY_HASH, SELECTION, WHERE
from jaxcrit.core.layers import read_scores, score_of
from jaxcrit.core.options import Options, option
from jaxcrit.core.selections import LayerSpec, resolve
from jaxcrit.reporting.exporters import FORMATS, export_selection


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectOptions(Options, title="what"):
    """What ``jaxcrit select`` is asked."""

    scores: str = option("", "scores.json of an analysis", word="FILE", free=BY_HASH)
    layers: str = option("critical", SELECTION, word="SPEC")
    criterion: str = option("delta_debiased", "score to choose by", word="KEY")
    trim: int = option(2, "layers at each end that are never critical", lowest=0)
    format: str = option("json", f"one of {', '.join(FORMATS)}", word="FORMAT", group="result")
    out: str = option("", "file to write (default: print)", word="FILE", free=WHERE, group="result")


OPTIONS = SelectOptions


def run(options: SelectOptions) -> int:
    """Chooses, and prints or writes the selection."""
    if not options.scores:
        raise UserError("select: expected --scores=FILE, the scores.json that jaxcrit analyze wrote")
    scores = read_scores(options.scores)
    spec = LayerSpec.parse(options.layers)
    key = spec.score_key or options.criterion
    score = score_of(scores, key, options.scores)
    chosen = resolve(
        spec,
        score.num_layers,
        scores=scores,
        criterion=key,
        trim=options.trim,
        model_hash=score.meta.get("model_hash"),
    )
    text = export_selection(chosen, options.format, score.meta.get("model_type"))
    if options.out:
        try:
            write_text(as_path(options.out), text)
        except OSError as error:
            raise UserError(f"--out={options.out}: cannot be written ({error.strerror})") from None
    else:
        sys.stdout.write(text)
    console.note(str(chosen))
    if options.out:
        shared.tell_next("select", options, options.out)
    return 0
