"""jaxcrit: find the critical layers of a language model, and train, freeze, swap, edit and test exactly those.

    import jaxcrit as jc

    model = jc.load()
    scores = jc.score(jc.capture(model, prompts))
    layers = jc.select(scores, "critical:3")

Names are loaded when they are used: importing jaxcrit imports neither jax nor numpy.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jaxcrit.api import (
        FinishedRun,
        Scores,
        ablate,
        capture,
        cka,
        compare,
        correlate,
        edit,
        export,
        finetune,
        generate,
        inspect,
        load,
        open_run,
        plot,
        prune,
        remix,
        reuse,
        score,
        screen,
        select,
        states,
        substitute,
        trace,
    )
    from jaxcrit.core.errors import UserError

__all__ = [
    "FinishedRun",
    "Scores",
    "UserError",
    "ablate",
    "capture",
    "cka",
    "compare",
    "correlate",
    "edit",
    "export",
    "finetune",
    "generate",
    "inspect",
    "load",
    "open_run",
    "plot",
    "prune",
    "remix",
    "reuse",
    "score",
    "screen",
    "select",
    "states",
    "substitute",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("jaxcrit.core.errors" if name == "UserError" else "jaxcrit.api"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
