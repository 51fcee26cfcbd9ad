"""``jaxcrit compare``: CKA between two models over the same prompts, from their fingerprints."""

from __future__ import annotations

from jaxcrit.studies.options import CompareOptions

OPTIONS = CompareOptions


def run(options: CompareOptions) -> int:
    """Compares, writes the report, prints the table."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.comparison import comparison_report
    from jaxcrit.studies.comparison import Comparison, run_compare

    def finish(found: Comparison) -> None:
        comparison_report(found).write(found.out, found.run)

    comparison = run_compare(options, progress=bars, finish=finish)
    print(comparison_report(comparison).text())
    print(f"report: {comparison.out / 'report.html'}")
    return 0
