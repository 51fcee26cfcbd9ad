"""``jaxcrit score``: layers by other criteria: weights, states, gradients."""

from __future__ import annotations

from jaxcrit.studies.options import ScoreOptions

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
