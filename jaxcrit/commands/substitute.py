"""``jaxcrit substitute``: what the tuned model loses when layers are taken from the base."""

from __future__ import annotations

import dataclasses
import sys
from typing import Literal

from jaxcrit.core.groups import BY_HASH, MeshOptions, TestedRowOptions
from jaxcrit.core.options import Options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairOptions(Options, title="model and data"):
    """Which two models."""

    base: str = option("", "checkpoint, hub id or finetune run (default: embedded)", word="DIR", free=BY_HASH)
    tuned: str = option("", "what was tuned from it: checkpoint or finetune run", word="DIR", free=BY_HASH)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubstituteOptions(PairOptions, TestedRowOptions, MeshOptions, title="layers"):
    """What ``jaxcrit substitute`` is asked; all datasets are one here, rendered by the tuned model's template."""

    window: int = option(5, "layers taken together, around each in turn; odd", lowest=1)
    sites: Literal["blocks", "attn", "mlp"] = option(
        "blocks", "whole blocks, or their attention or MLP alone", ("blocks", "attn", "mlp")
    )
    reverse: bool = option(False, "put layers of the tuned model into the base")
    sets: str = option("", "these sets in place of windows: 3-5,9;first:4;@layers.json", word="SPECS")
    random: int = option(0, "draws of as many random layers, to compare with", lowest=0)
    seed: int = option(0, "seed of the random layers", lowest=0)

    @property
    def score(self) -> str:
        """Score key: other sites or the other direction are another quantity."""
        suffix = "" if self.sites == "blocks" else f"_{self.sites}"
        return f"substitution{suffix}{'_reverse' if self.reverse else ''}"


OPTIONS = SubstituteOptions


def run(options: SubstituteOptions) -> int:
    """Substitutes, writes the report, prints the table."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.report import Report
    from jaxcrit.reporting.substitution import substitution_report
    from jaxcrit.studies.substitution import Substitution, run_substitution

    def report(found: Substitution) -> Report:
        return substitution_report(found.run, found.scores, found.warnings)

    found = run_substitution(options, progress=bars, finish=lambda found: report(found).write(found.out, found.run))
    print(report(found).text(style=sys.stdout.isatty()))
    print(f"report: {found.out / 'report.html'}")
    return 0
