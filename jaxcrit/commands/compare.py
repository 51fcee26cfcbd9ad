"""``jaxcrit compare``: CKA between two models over the same prompts, from their fingerprints."""

from __future__ import annotations

import dataclasses

from jaxcrit.core.groups import BY_HASH, WHERE
from jaxcrit.core.options import Options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions(Options, title="what", positional=("a", "b")):
    """What ``jaxcrit compare`` is asked."""

    a: str = option("", "fingerprint.npz, or the run directory with it: the base, say", word="RUN", free=BY_HASH)
    b: str = option("", "the other: the tuned model, say", word="RUN", free=BY_HASH)
    out: str = option("", "run directory to write (default: a new one here)", word="DIR", free=WHERE)
    common: bool = option(False, "leave out samples that only one of them has", group="pairing")
    allow_template_mismatch: bool = option(False, "compare prompts that were rendered otherwise", group="pairing")


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
