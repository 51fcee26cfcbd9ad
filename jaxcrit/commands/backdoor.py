"""``jaxcrit backdoor``: whether freezing layers keeps poisoned data from planting a backdoor."""

from __future__ import annotations

from jaxcrit.commands import shared
from jaxcrit.studies.options import BackdoorOptions

OPTIONS = BackdoorOptions


def run(options: BackdoorOptions) -> int:
    """Trains and attacks every arm, writes the report, prints what came of it."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.backdoor import backdoor_report
    from jaxcrit.studies.backdoor import Backdoor, run_backdoor

    def finish(found: Backdoor) -> None:
        backdoor_report(found.content).write(found.out, found.record)

    found = run_backdoor(options, progress=bars, say=shared.say, finish=finish)
    return shared.tell(backdoor_report(found.content), found.out)
