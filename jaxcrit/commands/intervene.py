"""``jaxcrit intervene``: removes components of the states, or steers, and shows what an answer becomes."""

from __future__ import annotations

import dataclasses

from jaxcrit.core.groups import BY_HASH, MeshOptions, ModelOptions, OutOptions, RowOptions
from jaxcrit.core.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterveneOptions(ModelOptions, RowOptions, OutOptions, MeshOptions, title="intervention"):
    """What ``jaxcrit intervene`` is asked; one dataset."""

    data: str = option("demo:arithmetic", "prompts: JSONL, dolly:JSONL, ...", word="FILE", free=BY_HASH)
    layers: str = option("critical:1", "critical:K, noncritical:K, first:K, 3-5,9, ...", word="SPEC")
    components: str = option("0,1,2", "principal components to remove; empty for none", word="LIST")
    prompt_index: int = option(0, "row of the prompt to answer, from 0", lowest=0)
    mode: str = option("paper", "the prompt's part, the state's own, ...", ("paper", "project", "steer", "none"))
    steer_from: str = option("", "rows whose mean state is taken away (steer)", word="FILE", free=BY_HASH)
    steer_to: str = option("", "rows whose mean state is added (steer)", word="FILE", free=BY_HASH)
    strength: float = option(1.0, "factor of that difference")
    max_new_tokens: int = option(64, "tokens of each answer, at most", lowest=1, group="generation")
    stop: str = option(
        "", "more tokens that end an answer, ids or texts, with commas", word="TOKENS", group="generation"
    )


OPTIONS = InterveneOptions


def run(options: InterveneOptions) -> int:
    """Answers one prompt with and without the intervention, and prints both."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.interventions import intervention_text
    from jaxcrit.studies.interventions import run_intervene

    print(intervention_text(run_intervene(options, progress=bars)))
    return 0
