"""``jaxcrit score``: flags are the fields of `jaxcrit.studies.scoring.ScoreConfig`."""

from __future__ import annotations

from typing import Any

from absl.flags import FlagValues

from jaxcrit.commands.data import RENDERING, ROWS
from jaxcrit.core.flags import Flag

FLAGS = {
    "what": (
        Flag("model", "", "checkpoint, hub id or finetune run (default: embedded)", word="DIR"),
        Flag("base", "", "what it was tuned from, for weight_change", word="DIR"),
        *ROWS,
        Flag("criteria", "", "keys with commas, of docs/criteria.md (default: all)", word="KEYS"),
        Flag("out", "", "run directory to write (default: a new one here)", word="DIR"),
        *RENDERING,
    ),
    "passes": (
        Flag("batch_size", 8, "rows per pass", lowest=1),
        Flag("dtype", "", "of weights and compute (default: float32 on CPU, else as read)", ("float32", "bfloat16")),
        Flag("precision", "highest", "of matrix products", ("default", "high", "highest")),
        Flag("mesh", "", "devices by axis, such as data=4,fsdp=2 (default: by model size)", word="AXES"),
    ),
}


def run(values: FlagValues) -> int:
    """Scores, writes, prints the table."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.scores import scores_text, write_scores_page
    from jaxcrit.studies.scoring import ScoreConfig, run_score

    given: dict[str, Any] = {flag.name: values[flag.name].value for group in FLAGS.values() for flag in group}
    scored = run_score(ScoreConfig(**given), progress=bars)
    page = write_scores_page(scored.scores, scored.warnings, scored.run, scored.out)
    print(scores_text(scored.scores, scored.warnings))
    print(f"report: {page}")
    return 0
