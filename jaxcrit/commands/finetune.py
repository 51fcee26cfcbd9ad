"""``jaxcrit finetune``: trains exactly the layers that are chosen."""

from __future__ import annotations

import sys

from jaxcrit.core.groups import FinetuneOptions

OPTIONS = FinetuneOptions


def run(options: FinetuneOptions) -> int:
    """Trains, draws the test loss, prints what came of it."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.training import finetune_text, write_curve
    from jaxcrit.studies.finetune import Finetuned, run_finetune

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def finish(found: Finetuned) -> None:
        write_curve(found.out, {"test loss": found.metrics})

    found = run_finetune(options, progress=bars, say=say, finish=finish)
    print(finetune_text(found.run, found.times, found.metrics, found.warnings, found.out))
    return 0
