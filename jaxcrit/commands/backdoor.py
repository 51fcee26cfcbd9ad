"""``jaxcrit backdoor``: whether freezing layers keeps poisoned data from planting a backdoor."""

from __future__ import annotations

from jaxcrit.commands import shared
from jaxcrit.core import console
from jaxcrit.studies.options import BackdoorOptions

OPTIONS = BackdoorOptions


def run(options: BackdoorOptions) -> int:
    """Trains and attacks every arm, draws, prints what came of it."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.backdoor import backdoor_text, write_figures
    from jaxcrit.studies.backdoor import Backdoor, run_backdoor

    def finish(found: Backdoor) -> None:
        write_figures(found.out, found.content)

    found = run_backdoor(options, progress=bars, say=shared.say, finish=finish)
    console.tell(backdoor_text(found.content, found.out))
    return 0
