"""``jaxcrit generate``: flags are the fields of `jaxcrit.studies.generation.GenerateConfig`."""

from __future__ import annotations

from typing import Any

from absl.flags import FlagValues

from jaxcrit.commands.data import RENDERING, ROWS
from jaxcrit.core.flags import Flag

FLAGS = {
    "what": (
        Flag("model", "", "checkpoint directory, hub id or finetune run (default: embedded)", word="DIR"),
        *ROWS,
        Flag("out", "", "run directory; a run in it goes on (default: a new one here)", word="DIR"),
        *RENDERING,
    ),
    "generation": (
        Flag("max_new_tokens", 64, "of each answer, at most", lowest=1),
        Flag("stop", "", "more tokens that end an answer, ids or texts, with commas", word="TOKENS"),
        Flag("temperature", 0.0, "of the draws; 0 takes the most likely token"),
        Flag("top_k", 0, "draws from the k most likely tokens; 0 from all", lowest=0),
        Flag("top_p", 1.0, "draws from the likeliest tokens of this share together"),
        Flag("repetition_penalty", 1.0, "above 1 avoids tokens that have been used"),
        Flag("seed", 0, "of the draws", lowest=0),
    ),
    "machine": (
        Flag("batch_size", 16, "prompts at a time", lowest=1),
        Flag("dtype", "", "of weights and compute (default: float32 on CPU, else as read)", ("float32", "bfloat16")),
        Flag("mesh", "", "devices by axis, such as data=4,fsdp=2 (default: by model size)", word="AXES"),
    ),
}


def run(values: FlagValues) -> int:
    """Generates, shows the first answers, says where all of them are."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.generation import generations_text
    from jaxcrit.studies.generation import GenerateConfig, run_generate

    given: dict[str, Any] = {flag.name: values[flag.name].value for group in FLAGS.values() for flag in group}
    print(generations_text(run_generate(GenerateConfig(**given), progress=bars)))
    return 0
