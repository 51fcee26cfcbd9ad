"""``jaxcrit intervene``: removes components of the states, or steers, and shows what an answer becomes."""

from __future__ import annotations

from jaxcrit.studies.options import InterveneOptions

OPTIONS = InterveneOptions


def run(options: InterveneOptions) -> int:
    """Answers one prompt with and without the intervention, and prints both."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.interventions import intervention_text
    from jaxcrit.studies.interventions import run_intervene

    print(intervention_text(run_intervene(options, progress=bars)))
    return 0
