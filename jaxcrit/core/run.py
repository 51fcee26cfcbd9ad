"""The life of a run directory: who may write to it, ``run.json`` before and after, nothing left behind by a mistake.

Every command works inside `running`. ``run.json`` says ``running`` from the first written byte on and ``complete`` only
when the block has ended, after the report and everything else is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from jaxcrit import __version__
from jaxcrit.core import processes
from jaxcrit.core.digests import refuse_differing
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import as_path, check_name
from jaxcrit.core.hashing import sha256_json
from jaxcrit.core.options import Options, as_json, determining
from jaxcrit.core.pages import peak_gib
from jaxcrit.core.rundir import RunDirectory, read_record

RUNS = "jaxcrit-runs"  # where runs go that were given no directory
# Of run.json: what a run that goes on says anew.
_OF_A_LAUNCH = ("format", "format_version", "status", "identity", "time", "digests", "result", "warnings")
# Of a complete run that is begun again: files that are not read, but made anew.
_MADE_ANEW = (".html", ".png", ".md", ".txt", ".yml")
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers", "safetensors")


class Described(Protocol):
    """What a run records of a dataset."""

    @property
    def name(self) -> str:
        """Name within the run."""

    def describe(self) -> dict[str, Any]:
        """JSON values; ``hash`` identifies the content."""


class DescribedModel(Protocol):
    """What a run records of a model."""

    @property
    def short_name(self) -> str:
        """Name for a directory."""

    def describe(self) -> dict[str, Any]:
        """JSON values; ``hash`` identifies configuration and weights."""

    def machine(self) -> dict[str, Any]:
        """JSON values: devices, mesh, form of attention."""

    def settled(self, options: Any) -> dict[str, Any]:
        """What options come to with this model: ``template``, how it renders rows; ``dtype`` of weights and compute."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a model or of data that is not at hand itself: read from an earlier run, say.

    Attributes:
        name: name within the run; of a model, name for a directory.
        facts: JSON values, ``hash`` among them.
    """

    name: str
    facts: Mapping[str, Any]

    @property
    def short_name(self) -> str:
        """Name for a directory."""
        return self.name

    def describe(self) -> dict[str, Any]:
        """The facts."""
        return dict(self.facts)

    def machine(self) -> dict[str, Any]:
        """Nothing: no devices have been at work."""
        return {}

    def settled(self, options: Any) -> dict[str, Any]:
        """Nothing: no weights are at hand."""
        return {}


@dataclasses.dataclass(eq=False)
class Run:
    """A run in progress.

    Attributes:
        directory: where it writes; None where nothing is to be written (a Python caller that gave no ``out``).
        record: content of ``run.json``; what is added while the run goes on stands there at the end.
        times: what changes from run to run: seconds, counts of what was done this time; ``time`` of ``run.json``.
        precious: whether what has been written stays when the run fails; set once hours are in it.
        earlier: ``run.json`` of an interrupted or complete run of the same identity; empty where there is none.
    """

    directory: RunDirectory | None
    record: dict[str, Any]
    times: dict[str, Any]
    earlier: Mapping[str, Any]
    precious: bool = False

    @property
    def path(self) -> Path:
        """The run directory.

        Raises:
            AssertionError: nothing is to be written; see `out`.
        """
        assert self.directory is not None
        return self.directory.path

    @property
    def kept(self) -> bool:
        """Whether the run writes anything."""
        return self.directory is not None

    @property
    def out(self) -> Path | None:
        """The run directory; None where nothing is to be written."""
        return None if self.directory is None else self.directory.path

    @property
    def complete(self) -> bool:
        """Whether a run of the same identity has ended here before."""
        return self.earlier.get("status") == "complete"

    def folder(self, name: str, alone: bool) -> Path:
        """Where the files of a dataset go: the run directory, or one of its own where there are several datasets."""
        path = self.path if alone else self.path / name
        processes.make_directory(path)
        return path

    def save(self) -> None:
        """Writes ``run.json`` as it stands, status ``running``."""
        if self.directory is not None:
            self.directory.begin(self.record)


@contextlib.contextmanager
def running(
    command: str,
    options: Options,
    *,
    models: Mapping[str, DescribedModel],
    datasets: Sequence[Described] = (),
    resolved: Mapping[str, Any] | None = None,
    also: Mapping[str, Any] | None = None,
    further: Sequence[Options] = (),
    keep: bool = True,
    read_back: Any = None,
) -> Iterator[Run]:
    """Opens the directory of a run, and closes it: complete, or, after a user's mistake, as if it had never been.

    Whoever opens it writes the report too, before the block ends.

    Args:
        command: name of the command.
        options: what is asked; the options that are not free determine the results.
        models: models by role, ``model`` first; the first names the directory.
        datasets: rendered datasets.
        resolved: values that stand for options in what determines the results, such as layers by number; the dtype of
            the first model does so without being named.
        also: further JSON values that determine the results.
        further: further options, of single criteria; they stand beside the others.
        keep: whether there is a directory; False for a Python caller that gave none: nothing is written.
        read_back: declaration (`jaxcrit.core.schema`) of ``run.json`` of a complete run, which is left as it is for the
            caller to read back; None for a run again, on what it has kept.

    Yields:
        The run.

    Raises:
        UserError: the directory holds another run or other files, or cannot be written; or whatever the block raised,
            after the directory has been taken back.
    """
    described = {role: model.describe() for role, model in models.items()}
    for one in datasets:
        if not isinstance(one, Facts):  # by which no directory is called
            check_name(one.name, "datasets", alone=len(datasets) == 1)
    data = {one.name: one.describe() for one in datasets}
    first = next(iter(models.values()), None)
    settled = first.settled(options) if first else {}
    template = settled.pop("template", None)
    determines = {
        "command": command,
        "config": _joined(determining, options, further) | settled | dict(resolved or {}),
        **{f"{role}_hash": one["hash"] for role, one in described.items()},
        **({"template_hash": template["hash"]} if template else {}),
        **(also or {}),
        "data": {name: one["hash"] for name, one in data.items()},
        "jaxcrit": __version__,
    }
    name = f"{command}-{first.short_name if first else ''}-{sha256_json(determines)[:8]}".replace("--", "-")
    out = as_path(given) if (given := getattr(options, "out", "")) else Path(RUNS) / name
    directory = RunDirectory.open(out, determines) if keep else None
    earlier: Mapping[str, Any] = {}
    if directory is not None and directory.resumed:
        earlier = processes.share(lambda: read_record(out))
    kept = {key: value for key, value in earlier.items() if key not in _OF_A_LAUNCH}
    record: dict[str, Any] = {
        **kept,
        "command": command,
        "config": _joined(as_json, options, further),
        "determines": determines,
        **described,
        **({"template": template} if template else {}),
        "data": data,
        **(first.machine() if first else {}),
        "versions": versions(),
    }
    run = Run(directory, record, {}, earlier)
    if directory is not None and run.complete and read_back:
        directory.forget()
        processes.share(lambda: None if read_back is True else read_record(out, read_back) and None)
        yield run
        return
    if directory is not None and run.complete:
        files = earlier.get("digests", {}).get("files", {})
        read = {name: one for name, one in files.items() if not name.endswith(_MADE_ANEW)}
        processes.share(lambda: refuse_differing(out, read))
    try:
        yield from _lived(run)
    finally:
        if directory is not None:
            directory.release()


def _lived(run: Run) -> Iterator[Run]:
    """From ``running`` to ``complete``."""
    directory, record = run.directory, run.record
    began, clock = time.time(), time.perf_counter()
    run.save()
    try:
        yield run
    except UserError:
        if directory is not None and not run.precious:
            directory.discard()
        raise
    except KeyboardInterrupt:
        if directory is None:
            raise
        told = f"{directory.path} keeps what is done, and the same command goes on from there"
        raise KeyboardInterrupt(told) from None
    spent = {
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "seconds": round(time.perf_counter() - clock, 3),
        "peak_gib": peak_gib(),
    }
    record["time"] = {**spent, **run.times}
    if directory is not None:
        directory.finish(record)


def _joined(
    values: Callable[[Options], dict[str, Any]], options: Options, further: Sequence[Options]
) -> dict[str, Any]:
    return {name: value for one in (options, *further) for name, value in values(one).items()}


def versions() -> dict[str, str]:
    """What a run is computed with."""
    packages = {name: metadata.version(name) for name in _PACKAGES}
    return {"jaxcrit": __version__, "python": platform.python_version(), **packages}
