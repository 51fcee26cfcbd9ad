"""``jaxcrit correlate``: flags are the fields of `jaxcrit.studies.correlation.CorrelationConfig`."""

from __future__ import annotations

from typing import Any

from absl.flags import FlagValues

from jaxcrit.core.flags import Flag

FLAGS = {
    "what": (
        Flag("scores", (), "scores.json to compare; give it twice", word="FILE[:KEY]"),
        Flag("all", "", "instead: every score in a folder against every other", word="DIR"),
        Flag("out", "", "directory for pictures and report (default: none)", word="DIR"),
    ),
    "tests": (
        Flag("block", 0, "layers to a block; 0 for twice the wider window", lowest=0),
        Flag("seed", 0, "of permutations and interval", lowest=0),
    ),
}


def run(values: FlagValues) -> int:
    """Correlates, draws where asked, prints."""
    from jaxcrit.reporting.correlation import correlation_text, write_correlation
    from jaxcrit.studies.correlation import CorrelationConfig, run_correlation

    given: dict[str, Any] = {flag.name: values[flag.name].value for group in FLAGS.values() for flag in group}
    correlated = run_correlation(CorrelationConfig(**given))
    print(correlation_text(correlated))
    if correlated.out is not None:
        print(f"report: {write_correlation(correlated)}")
    return 0
