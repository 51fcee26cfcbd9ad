"""``jaxcrit correlate``: whether two scores of the layers agree, honestly."""

from __future__ import annotations

from jaxcrit.studies.options import CorrelateOptions

OPTIONS = CorrelateOptions


def run(options: CorrelateOptions) -> int:
    """Correlates, draws where asked, prints."""
    from jaxcrit.reporting.correlation import correlation_report
    from jaxcrit.studies.correlation import run_correlation

    correlated = run_correlation(options)
    report = correlation_report(correlated)
    print(report.text())
    if correlated.out is not None:
        print(f"report: {report.write(correlated.out, correlated.run)}")
    return 0
