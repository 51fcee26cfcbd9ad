"""``jaxcrit score``: layers by other criteria: weights, states, gradients."""

from __future__ import annotations

from jaxcrit.commands import shared
from jaxcrit.core.options import Options
from jaxcrit.studies.options import ScoreOptions

OPTIONS = ScoreOptions


def extra() -> list[type[Options]]:
    """Options of single criteria, given as ``--KEY.NAME``."""
    from jaxcrit.criteria.registry import own_options

    return own_options()


def run(options: ScoreOptions, *own: Options) -> int:
    """Scores, writes, prints the table."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.report import Report
    from jaxcrit.reporting.scores import scores_report
    from jaxcrit.studies.scoring import Scored, run_score

    def report(scored: Scored) -> Report:
        return scores_report(scored.scores, scored.warnings)

    def finish(scored: Scored) -> None:
        if scored.out is not None:
            report(scored).write(scored.out, scored.run)

    scored = run_score(options, own, progress=bars, finish=finish)
    return shared.tell(report(scored), scored.out)
