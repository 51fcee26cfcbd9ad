"""``jaxcrit intervene``: flags are the fields of `jaxcrit.studies.interventions.InterveneConfig`."""

from __future__ import annotations

import dataclasses
from typing import Any

from absl.flags import FlagValues

from jaxcrit.commands.data import RENDERING, ROWS
from jaxcrit.core.flags import Flag

_DATA, *_ROWS = ROWS
FLAGS = {
    "what": (
        Flag("model", "", "checkpoint directory, hub id or finetune run (default: embedded)", word="DIR"),
        dataclasses.replace(_DATA, default="demo:arithmetic", help="prompts: JSONL, dolly:JSONL, ..."),
        *_ROWS,
        Flag("out", "", "run directory to write (default: a new one here)", word="DIR"),
        *RENDERING,
    ),
    "intervention": (
        Flag("layers", "critical:1", "critical:K, noncritical:K, first:K, 3-5,9, ...", word="SPEC"),
        Flag("components", "0,1,2", "principal components to remove; empty for none", word="LIST"),
        Flag("prompt_index", 0, "row of the prompt to answer, from 0", lowest=0),
        Flag("mode", "paper", "the prompt's part, the state's own, ...", ("paper", "project", "steer", "none")),
        Flag("steer_from", "", "rows whose mean state is taken away (steer)", word="FILE"),
        Flag("steer_to", "", "rows whose mean state is added (steer)", word="FILE"),
        Flag("strength", 1.0, "factor of that difference"),
    ),
    "generation": (
        Flag("max_new_tokens", 64, "of each answer, at most", lowest=1),
        Flag("stop", "", "more tokens that end an answer, ids or texts, with commas", word="TOKENS"),
        Flag("dtype", "", "of weights and compute (default: float32 on CPU, else as read)", ("float32", "bfloat16")),
        Flag("mesh", "", "devices by axis, such as data=4,fsdp=2 (default: by model size)", word="AXES"),
    ),
}


def run(values: FlagValues) -> int:
    """Answers one prompt with and without the intervention, and prints both."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.interventions import intervention_text
    from jaxcrit.studies.interventions import InterveneConfig, run_intervene

    given: dict[str, Any] = {flag.name: values[flag.name].value for group in FLAGS.values() for flag in group}
    print(intervention_text(run_intervene(InterveneConfig(**given), progress=bars)))
    return 0
