"""``jaxcrit substitute``: flags are the fields of `jaxcrit.studies.substitution.SubstitutionConfig`."""

from __future__ import annotations

import sys
from typing import Any

from absl.flags import FlagValues

from jaxcrit.commands.data import RENDERING, ROWS
from jaxcrit.core.flags import Flag

TESTED = (
    *RENDERING,
    Flag("max_length", 0, "tokens per row; 0 for the model's context", lowest=0),
    Flag("batch_size", 8, "rows per forward pass", lowest=1),
    Flag("dtype", "", "of weights and compute (default: float32 on CPU, else as read)", ("float32", "bfloat16")),
    Flag("mesh", "", "devices by axis, such as data=4,fsdp=2 (default: by model size)", word="AXES"),
)
FLAGS = {
    "what": (
        Flag("base", "", "checkpoint, hub id or finetune run (default: the embedded model)", word="DIR"),
        Flag("tuned", "", "what was tuned from it: checkpoint or finetune run", word="DIR"),
        *ROWS,
        Flag("out", "", "run directory; a run in it goes on (default: a new one here)", word="DIR"),
    ),
    "layers": (
        Flag("window", 5, "layers taken together, around each in turn; odd", lowest=1),
        Flag("sites", "blocks", "whole blocks, or their attention or MLP alone", ("blocks", "attn", "mlp")),
        Flag("reverse", False, "put layers of the tuned model into the base"),
        Flag("sets", "", "these sets in place of windows: 3-5,9;first:4;@layers.json", word="SPECS"),
        Flag("random", 0, "draws of as many random layers, to compare with", lowest=0),
        Flag("seed", 0, "of the random layers", lowest=0),
    ),
    "testing": TESTED,
}


def run(values: FlagValues) -> int:
    """Substitutes, writes the report, prints the table."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.substitution import substitution_text, write_substitution
    from jaxcrit.studies.substitution import SubstitutionConfig, run_substitution

    given: dict[str, Any] = {flag.name: values[flag.name].value for group in FLAGS.values() for flag in group}
    found = run_substitution(SubstitutionConfig(**given), progress=bars)
    report = write_substitution(found.out, found.run, found.scores, found.warnings)
    print(substitution_text(found.run, found.warnings, style=sys.stdout.isatty()))
    print(f"report: {report}")
    return 0
