"""Makes a changed run directory fit its digests again, as somebody would who wants to deceive."""

from pathlib import Path

from jaxcrit.core.digests import sealed, take
from jaxcrit.core.files import json_text
from jaxcrit.core.rundir import RUN_FORMAT, read_record


def sealed_again(run: Path) -> None:
    """Takes the digests of all files anew."""
    _write(run, {"digests": {"itself": "", "files": take(run, {})}})


def unfinished(run: Path) -> None:
    """Makes ``run.json`` that of a run that was killed before its end."""
    _write(run, {"status": "running", "digests": {"itself": "", "files": {}}})


def _write(run: Path, changes: dict) -> None:
    (run / "run.json").write_text(sealed(json_text(RUN_FORMAT, read_record(run) | changes)))
