"""``jaxcrit correlate``: whether two scores of the layers agree, honestly."""

from __future__ import annotations

import dataclasses

from jaxcrit.core.groups import BY_HASH, WHERE
from jaxcrit.core.options import Options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorrelateOptions(Options, title="what"):
    """What ``jaxcrit correlate`` is asked."""

    scores: tuple[str, ...] = option((), "scores.json to compare; give it twice", word="FILE[:KEY]", free=BY_HASH)
    all: str = option("", "instead: every score in a folder against every other", word="DIR", free=BY_HASH)
    out: str = option("", "directory for pictures and report (default: none)", word="DIR", free=WHERE)
    block: int = option(0, "layers to a block; 0 for twice the wider window", lowest=0, group="tests")
    seed: int = option(0, "seed of permutations and interval", lowest=0, group="tests")


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
