"""``jaxcrit ablate``: flags are the fields of `jaxcrit.studies.ablation.AblationConfig`."""

from __future__ import annotations

import sys
from typing import Any

from absl.flags import FlagValues

from jaxcrit.commands.data import ROWS
from jaxcrit.commands.substitute import TESTED
from jaxcrit.core.flags import Flag

FLAGS = {
    "what": (
        Flag("model", "", "checkpoint, hub id or finetune run (default: the embedded model)", word="DIR"),
        *ROWS,
        Flag("out", "", "run directory; a run in it goes on (default: a new one here)", word="DIR"),
    ),
    "layers": (
        Flag("methods", "skip,mean", "what a layer adds: skip nothing, mean the average", word="LIST"),
        Flag("sites", "blocks", "whole blocks, or their attention or MLP alone", ("blocks", "attn", "mlp")),
        Flag("generate", False, "count right answers too, with each layer skipped"),
        Flag("max_new_tokens", 64, "of each answer, at most", lowest=1),
    ),
    "testing": TESTED,
}


def run(values: FlagValues) -> int:
    """Ablates, writes the report, prints the table."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.ablation import ablation_text, write_ablation
    from jaxcrit.studies.ablation import AblationConfig, run_ablation

    given: dict[str, Any] = {flag.name: values[flag.name].value for group in FLAGS.values() for flag in group}
    found = run_ablation(AblationConfig(**given), progress=bars)
    report = write_ablation(found.out, found.run, found.scores)
    print(ablation_text(found.run, found.scores, style=sys.stdout.isatty()))
    print(f"report: {report}")
    return 0
