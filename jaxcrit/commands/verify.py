"""``jaxcrit verify``: whether run directories are what they claim; loads no model."""

from __future__ import annotations

import dataclasses

from jaxcrit.core import console
from jaxcrit.core.errors import UserError
from jaxcrit.core.options import Options, option

ANOTHER = 1  # exit code: a run is not what it claims


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyOptions(Options, title="what", positional=("run",)):
    """What ``jaxcrit verify`` is asked."""

    run: tuple[str, ...] = option((), "run directory; several are given as words", word="DIR")
    tolerance: float = option(1e-5, "difference from what Grams give that is rounding", lowest=0)


OPTIONS = VerifyOptions


def run(options: VerifyOptions) -> int:
    """Verifies every run; prints a line per finding and one per run."""
    from jaxcrit.core.files import as_path
    from jaxcrit.studies.verification import verify

    if not options.run:
        raise UserError("verify: expected run directories: jaxcrit verify RUN [RUN ...]")
    code = 0
    for name in options.run:
        found = verify(as_path(name), options.tolerance)
        for line in found.findings:
            console.tell(f"{name}: {line}")
        counts = [f"{found.files} files have their digests"]
        counts += [f"arrays of {found.steps} checkpoints have theirs"] if found.steps else []
        counts += [f"redone from Grams: {', '.join(found.redone)}"] if found.redone else []
        number = len(found.findings)
        verdict = f"{number} finding{'s' if number > 1 else ''}" if number else "is what it claims"
        console.tell(f"{name}: {verdict}; {'; '.join(counts)}")
        code = code or (ANOTHER if found.findings else 0)
    return code
