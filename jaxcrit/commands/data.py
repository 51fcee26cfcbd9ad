"""``jaxcrit data``: flags are the fields of `jaxcrit.data.rendering.DataConfig`."""

from __future__ import annotations

from typing import Any

from absl.flags import FlagValues

from jaxcrit.core.flags import Flag

# The flags that say which rows a command reads and how they are rendered.
ROWS = (
    Flag("data", "", "JSONL, or dolly:JSONL, ...; with commas (default: embedded)", word="FILE"),
    Flag("split", "", "of alpaca, dolly, ... (default: test; to train: train)", ("train", "val", "test", "all")),
    Flag("limit", 0, "first N rows of each dataset only; 0 for all", lowest=0),
    Flag("shuffle_seed", -1, "shuffles rows before --limit; -1 does not", lowest=-1),
)
RENDERING = (
    Flag("template", "auto", "how prompts are wrapped", ("auto", "none", "chat", "llama2", "llama3", "phi3")),
    Flag("edition", "clean", "the model's template, or the paper's strings", ("clean", "paper")),
    Flag("truncate", "", "keep this end of what is too long (default: no cut)", ("left", "right", "paper")),
)
FLAGS = {
    "what": (
        Flag("model", "", "checkpoint directory or hub id (default: the embedded model)", word="DIR"),
        *ROWS,
        Flag("out", "", "directory for examples.jsonl, one line per row (default: none)", word="DIR"),
    ),
    "rendering": (*RENDERING, Flag("max_length", 0, "tokens per row; 0 for the model's context", lowest=0)),
}


def run(values: FlagValues) -> int:
    """Renders, shows, and writes where asked."""
    from jaxcrit.data.rendering import DataConfig, run_data
    from jaxcrit.reporting.data import data_text

    given: dict[str, Any] = {flag.name: values[flag.name].value for group in FLAGS.values() for flag in group}
    report = run_data(DataConfig(**given))
    print(data_text(report.shown, report.lengths, report.limit, report.template_hash))
    if report.written:
        print(f"examples: {report.written}")
    return 0
