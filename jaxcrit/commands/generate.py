"""``jaxcrit generate``: a model's answers to every prompt."""

from __future__ import annotations

import dataclasses

from jaxcrit.core.groups import SHAPE, BatchOptions, MeshOptions, ModelOptions, OutOptions, RowOptions
from jaxcrit.core.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(ModelOptions, RowOptions, OutOptions, BatchOptions, MeshOptions, title="generation"):
    """What ``jaxcrit generate`` is asked."""

    batch_size: int = option(16, "prompts at a time", lowest=1, free=SHAPE)
    max_new_tokens: int = option(64, "tokens of each answer, at most", lowest=1)
    stop: str = option("", "more tokens that end an answer, ids or texts, with commas", word="TOKENS")
    temperature: float = option(0.0, "temperature of the draws; 0 takes the most likely token")
    top_k: int = option(0, "draws from the k most likely tokens; 0 from all", lowest=0)
    top_p: float = option(1.0, "draws from the likeliest tokens of this share together")
    repetition_penalty: float = option(1.0, "above 1 avoids tokens that have been used")
    seed: int = option(0, "seed of the draws", lowest=0)


OPTIONS = GenerateOptions


def run(options: GenerateOptions) -> int:
    """Generates, shows the first answers, says where all of them are."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.generation import generations_text
    from jaxcrit.studies.generation import run_generate

    print(generations_text(run_generate(options, progress=bars)))
    return 0
