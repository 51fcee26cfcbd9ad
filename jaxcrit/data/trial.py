"""Renders a chat template in a process of its own, which time and memory end: ``python trial.py < JSON``.

A template is a program that came with a checkpoint. The sandbox keeps it from files and from Python, not from running
for ever or filling memory. This file imports nothing of jaxcrit, so that the process starts in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

SECONDS, BYTES = 5, 2**30


def main() -> int:
    """Renders; the exit code is 0 also where the template refuses, for then the caller is told so in time."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # where there are none, the caller has a clock
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    given = json.load(sys.stdin)
    try:
        _environment().from_string(given["template"]).render(**given["values"])
    except MemoryError:
        return 1
    except Exception:
        return 0
    return 0


def _environment() -> Any:
    """What transformers renders in, as far as it changes what is run."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = lambda value, **options: json.dumps(value, **options)
    made.globals |= {"raise_exception": refuse, "strftime_now": lambda form: form}
    return made


if __name__ == "__main__":
    sys.exit(main())
