"""``jaxcrit score``: layers by other criteria: weights, states, gradients."""

from __future__ import annotations

import dataclasses

from jaxcrit.core.groups import (
    BY_HASH,
    BatchOptions,
    MeshOptions,
    ModelOptions,
    OutOptions,
    PrecisionOptions,
    RowOptions,
)
from jaxcrit.core.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreOptions(ModelOptions, RowOptions, OutOptions, BatchOptions, PrecisionOptions, MeshOptions, title="criteria"):
    """What ``jaxcrit score`` is asked."""

    criteria: str = option("", "keys with commas, of docs/criteria.md (default: all)", word="KEYS")
    base: str = option("", "what the model was tuned from, for weight_change", word="DIR", free=BY_HASH)


OPTIONS = ScoreOptions


def run(options: ScoreOptions) -> int:
    """Scores, writes, prints the table."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.report import Report
    from jaxcrit.reporting.scores import scores_report
    from jaxcrit.studies.scoring import Scored, run_score

    def report(scored: Scored) -> Report:
        return scores_report(scored.scores, scored.warnings)

    scored = run_score(options, progress=bars, finish=lambda scored: report(scored).write(scored.out, scored.run))
    print(report(scored).text())
    print(f"report: {scored.out / 'report.html'}")
    return 0
