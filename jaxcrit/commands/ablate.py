"""``jaxcrit ablate``: what a model loses without each layer."""

from __future__ import annotations

import dataclasses
import sys
from typing import Literal

from jaxcrit.core.groups import MeshOptions, ModelOptions, TestedRowOptions
from jaxcrit.core.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblateOptions(ModelOptions, TestedRowOptions, MeshOptions, title="layers"):
    """What ``jaxcrit ablate`` is asked; all datasets are one here."""

    methods: str = option("skip,mean", "what a layer adds: skip nothing, mean the average", word="LIST")
    sites: Literal["blocks", "attn", "mlp"] = option(
        "blocks", "whole blocks, or their attention or MLP alone", ("blocks", "attn", "mlp")
    )
    generate: bool = option(False, "count right answers too, with each layer skipped")
    max_new_tokens: int = option(64, "tokens of each answer, at most", lowest=1)

    def score(self, what: str) -> str:
        """Score key: of a method, or of ``skip_accuracy``."""
        return f"ablation_{what}{'' if self.sites == 'blocks' else f'_{self.sites}'}"


OPTIONS = AblateOptions


def run(options: AblateOptions) -> int:
    """Ablates, writes the report, prints the table."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.ablation import ablation_text, write_ablation
    from jaxcrit.studies.ablation import run_ablation

    found = run_ablation(options, progress=bars)
    report = write_ablation(found.out, found.run, found.scores)
    print(ablation_text(found.run, found.scores, style=sys.stdout.isatty()))
    print(f"report: {report}")
    return 0
