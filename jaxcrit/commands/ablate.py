"""``jaxcrit ablate``: what a model loses without each layer."""

from __future__ import annotations

import dataclasses
import sys
from typing import Literal

from jaxcrit.core.errors import UserError, did_you_mean, listed
from jaxcrit.core.groups import MeshOptions, ModelOptions, TestedRowOptions
from jaxcrit.core.options import option

METHODS = ("skip", "mean")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblateOptions(ModelOptions, TestedRowOptions, MeshOptions, title="layers"):
    """What ``jaxcrit ablate`` is asked; all datasets are one here."""

    methods: str = option("skip,mean", "what a layer adds: skip nothing, mean the average", word="LIST")
    sites: Literal["blocks", "attn", "mlp"] = option(
        "blocks", "whole blocks, or their attention or MLP alone", ("blocks", "attn", "mlp")
    )
    generate: bool = option(False, "count right answers too, with each layer skipped")
    max_new_tokens: int = option(64, "tokens of each answer, at most", lowest=1)

    def check(self) -> None:
        """Checks the methods by name."""
        super().check()
        for method in self.chosen_methods:
            if method not in METHODS:
                zero = " (zeroing the weights is the same as skip)"
                hint = zero if method == "zero" else did_you_mean(method, METHODS)
                raise UserError(
                    f"--methods={self.methods}: expected {listed(METHODS)} with commas, got {method!r}{hint}"
                )

    @property
    def chosen_methods(self) -> list[str]:
        """The methods, each once."""
        return list(dict.fromkeys(part.strip() for part in self.methods.split(",")))

    def score(self, what: str) -> str:
        """Score key: of a method, or of ``skip_accuracy``."""
        return f"ablation_{what}{'' if self.sites == 'blocks' else f'_{self.sites}'}"


OPTIONS = AblateOptions


def run(options: AblateOptions) -> int:
    """Ablates, writes the report, prints the table."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.ablation import ablation_report
    from jaxcrit.studies.ablation import Ablation, run_ablation

    def finish(found: Ablation) -> None:
        ablation_report(found.run, found.scores).write(found.out, found.run)

    found = run_ablation(options, progress=bars, finish=finish)
    print(ablation_report(found.run, found.scores).text(style=sys.stdout.isatty()))
    print(f"report: {found.out / 'report.html'}")
    return 0
