"""``jaxcrit generate``: a model's answers to every prompt."""

from __future__ import annotations

from jaxcrit.studies.options import GenerateOptions

OPTIONS = GenerateOptions


def run(options: GenerateOptions) -> int:
    """Generates, shows the first answers, says where all of them are."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.generation import generations_text
    from jaxcrit.studies.generation import run_generate

    print(generations_text(run_generate(options, progress=bars)))
    return 0
