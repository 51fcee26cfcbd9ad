"""``jaxcrit data``: what a model will see of a dataset."""

from __future__ import annotations

import dataclasses

from jaxcrit.core.groups import WHERE, LengthOptions, ModelOptions, OutOptions, RowOptions
from jaxcrit.core.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(ModelOptions, RowOptions, OutOptions, LengthOptions):
    """What ``jaxcrit data`` is asked."""

    out: str = option("", "directory for examples.jsonl, one line per row (default: none)", word="DIR", free=WHERE)


OPTIONS = DataOptions


def run(options: DataOptions) -> int:
    """Renders, shows, and writes where asked."""
    from jaxcrit.data.rendering import run_data
    from jaxcrit.reporting.data import data_text

    report = run_data(options)
    print(data_text(report.shown, report.lengths, report.limit, report.template_hash))
    if report.written:
        print(f"examples: {report.written}")
    return 0
