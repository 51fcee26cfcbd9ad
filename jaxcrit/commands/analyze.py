"""``jaxcrit analyze``: the critical layers of a model, and how sure that is."""

from __future__ import annotations

from jaxcrit.commands import shared
from jaxcrit.core.groups import AnalyzeOptions

OPTIONS = AnalyzeOptions


def run(options: AnalyzeOptions) -> int:
    """Analyses, writes the report, prints the table."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.analysis import analysis_report, write_configs
    from jaxcrit.studies.analysis import Analysis, run_analysis

    def finish(analysis: Analysis) -> None:
        if analysis.out is not None:
            write_configs(analysis, analysis.out)
            analysis_report(analysis).write(analysis.out, analysis.run)

    analysis = run_analysis(options, progress=bars, finish=finish)
    return shared.tell(analysis_report(analysis), analysis.out)
