"""``jaxcrit compare``: flags are the fields of `jaxcrit.studies.comparison.CompareConfig`."""

from __future__ import annotations

from typing import Any

from absl.flags import FlagValues

from jaxcrit.core.flags import Flag

POSITIONAL = ("a", "b")
FLAGS = {
    "what": (
        Flag("a", "", "fingerprint.npz, or the run directory with it: the base, say", word="RUN"),
        Flag("b", "", "the other: the tuned model, say", word="RUN"),
        Flag("out", "", "run directory to write (default: a new one here)", word="DIR"),
    ),
    "pairing": (
        Flag("common", False, "leave out samples that only one of them has"),
        Flag("allow_template_mismatch", False, "compare prompts that were rendered otherwise"),
    ),
}


def run(values: FlagValues) -> int:
    """Compares, writes the report, prints the table."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.comparison import comparison_text, write_comparison
    from jaxcrit.studies.comparison import CompareConfig, run_compare

    given: dict[str, Any] = {flag.name: values[flag.name].value for group in FLAGS.values() for flag in group}
    comparison = run_compare(CompareConfig(**given), progress=bars)
    report = write_comparison(comparison)
    print(comparison_text(comparison))
    print(f"report: {report}")
    return 0
