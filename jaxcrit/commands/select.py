"""``jaxcrit select``: chooses layers from the scores of an earlier run; loads no model, and no jax."""

from __future__ import annotations

import sys

from absl.flags import FlagValues

from jaxcrit.core.errors import UserError, did_you_mean
from jaxcrit.core.files import as_path, write_text
from jaxcrit.core.flags import Flag
from jaxcrit.core.layers import LayerSpec, read_scores, resolve
from jaxcrit.reporting.exporters import FORMATS, export_selection

FLAGS = {
    "what": (
        Flag("scores", "", "scores.json of an analysis", word="FILE"),
        Flag("layers", "critical", "critical:K, noncritical:K, first:K, 3-5,9, ...", word="SPEC"),
        Flag("criterion", "delta_debiased", "score to choose by", word="KEY"),
        Flag("trim", 2, "layers at each end that are never critical", lowest=0),
    ),
    "result": (
        Flag("format", "json", f"one of {', '.join(FORMATS)}", word="FORMAT"),
        Flag("out", "", "file to write (default: print)", word="FILE"),
    ),
}


def run(values: FlagValues) -> int:
    """Chooses, and prints or writes the selection."""
    if not values.scores:
        raise UserError("select: expected --scores=FILE, the scores.json that jaxcrit analyze wrote")
    scores = read_scores(values.scores)
    if values.criterion not in scores:
        nearest = did_you_mean(values.criterion, scores)
        raise UserError(f"{values.scores}: no score {values.criterion!r}{nearest}; it holds {', '.join(scores)}")
    score = scores[values.criterion]
    chosen = resolve(
        LayerSpec.parse(values.layers),
        score.num_layers,
        scores=score,
        trim=values.trim,
        model_hash=score.meta.get("model_hash"),
    )
    text = export_selection(chosen, values.format, score.meta.get("model_type"))
    if values.out:
        try:
            write_text(as_path(values.out), text)
        except OSError as error:
            raise UserError(f"--out={values.out}: cannot be written ({error.strerror})") from None
    else:
        sys.stdout.write(text)
    print(chosen, file=sys.stderr)
    return 0
