"""Gives damaged files to readers, in a process whose memory is bounded, and says what became of it.

    python -m support.fuzz --inputs=100               a table of all readers (JSON with --json=FILE)
    python -m support.fuzz --inputs=2000 GGUF facts   some of them
    python -m support.fuzz layers.json --number=17    one input, its files kept, its error with a traceback

Allowed are a result and a `UserError` of one line. The process may take 2 GiB more than it has when every reader has
read its valid input, an input 10 s, and files are written nowhere but in the scratch directory.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from support.damage import PLACES, damaged, put

if __name__ == "__main__":  # a test that imports this keeps its surroundings
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}
MEMORY, SECONDS = 2 * 2**30, 10
COLUMNS = ("inputs", "read", "refused", "tracebacks", "hangs", "memory", "outside")


class Slow(BaseException):
    """An input took too long."""


def _too_long(number: int, frame: FrameType | None) -> None:
    raise Slow


class Watch:
    """Notices what is written outside a directory, what is run and who is called up."""

    def __init__(self, inside: Path) -> None:
        self.inside, self.seen = str(inside), list[str]()
        sys.addaudithook(self)

    def __call__(self, event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = given
            written = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if written and isinstance(path, str | bytes | os.PathLike):
                self._at(event, path)
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate"):
            self._at(event, given[0])
            if event in ("os.rename", "os.symlink", "os.link"):
                self._at(event, given[1])
        elif event in ("os.system", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class"):
            self.seen.append(f"{event} {given!r:.200}")
        elif event == "subprocess.Popen" and "trial.py" not in str(given[1]):
            self.seen.append(f"{event} {given[1]!r:.200}")

    def _at(self, event: str, path: Any) -> None:
        if isinstance(path, int):
            return
        where = os.path.abspath(os.fsdecode(path))
        if not where.startswith((self.inside, "/dev/null", "/proc/")):
            self.seen.append(f"{event} {where}")


def outcome(read: Any, folder: Path) -> tuple[str, str]:
    """What became of an input: a column's name, and what was said."""
    from jaxcrit.core.errors import UserError

    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True, file=sys.__stderr__)  # where no signal gets through
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            read(folder)
        return "read", ""
    except UserError as error:
        text = str(error)
        return (
            ("refused", text) if "\n" not in text and len(text) < 5000 else ("tracebacks", f"not one line: {text:.300}")
        )
    except Slow:
        return "hangs", traceback.format_exc(limit=-3)
    except MemoryError:
        return "memory", _where(sys.exc_info()[1])
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        big = "emory" in type(error).__name__ or "bad_alloc" in str(error)
        return ("memory" if big else "tracebacks"), _where(error)
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()


def _where(error: BaseException | None) -> str:
    ours = [one for one in traceback.extract_tb(error.__traceback__ if error else None) if "/jaxcrit/" in one.filename]
    place = f"{ours[-1].filename.split('/jaxcrit/')[-1]}:{ours[-1].lineno}" if ours else "?"
    return f"{type(error).__name__}: {str(error)[:200]!r} at {place}"


def fill(folder: Path, files: Mapping[str, bytes | str]) -> None:
    """Makes a folder hold these files alone."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        put(folder / name, content)


def inputs(reader: Any, begin: int, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered inputs of a reader: first one for each of `PLACES` that a file can be, then damaged ones."""
    valid, beside = reader.files()
    places = [{name: place} for place in PLACES for name in sorted(valid)[:3]]
    for number in range(begin, begin + count):
        changed = places[number] if number < len(places) else damaged(valid, Random(f"{reader.name}/{number}"))
        yield number, {**beside, **valid, **changed} if number < len(places) else {**beside, **changed}


def tried(reader: Any, number_of: int, seconds: float, scratch: Path, watch: Watch, begin: int = 0) -> dict[str, Any]:
    """Gives a reader so many inputs, or as many as fit in the time."""
    counts, said, end = Counter[str](), list[str](), time.monotonic() + seconds
    folder = scratch / "in"
    for number, files in inputs(reader, begin, number_of):
        fill(folder, files)
        (scratch / "now").write_text(f"{reader.name} --number={number}")
        watch.seen.clear()
        how, text = outcome(reader.read, folder)
        counts.update(("inputs", how))
        if watch.seen:
            counts["outside"] += 1
            text, how = watch.seen[0], "outside"
        if how not in ("read", "refused"):
            said.append(f"{reader.name} --number={number}: {how}: {text}")
        if time.monotonic() > end:
            break
    return {**{column: counts[column] for column in COLUMNS}, "said": said}


def _memory() -> int:
    """Bytes of address space that the process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main() -> int:
    """Makes the table."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("readers", nargs="*")
    asked.add_argument("--inputs", type=int, default=100, help="of each reader; slow ones take fewer")
    asked.add_argument("--total", type=int, default=0, help="instead: of all readers together")
    asked.add_argument("--begin", type=int, default=0, help="number of the first input")
    asked.add_argument("--seconds", type=float, default=1e9, help="of each reader, at most")
    asked.add_argument("--number", type=int, default=-1, help="this input alone")
    asked.add_argument("--json", type=Path)
    given = asked.parse_args()
    warnings.simplefilter("error")
    sys.dont_write_bytecode = True
    scratch = Path(tempfile.mkdtemp(prefix="hostile"))
    for name in ("HOME", "JAXCRIT_CACHE", "HF_HOME", "TMPDIR"):
        os.environ[name] = str(scratch / name.lower())
        (scratch / name.lower()).mkdir()
    tempfile.tempdir = str(scratch / "tmpdir")
    os.chdir(scratch)
    from support.readers import readers

    table = {name: one for name, one in readers().items() if not given.readers or name in given.readers}
    print(f"in {scratch}, where `now` names the input", flush=True)
    unread, ran = [], set[str]()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and "/jaxcrit/" in frame.f_code.co_filename:
            ran.add(f"{frame.f_code.co_filename.rpartition('/jaxcrit/')[2]}:{frame.f_code.co_qualname}")

    for name, reader in table.items():  # whatever is imported or compiled is there before memory is bounded
        valid, beside = reader.files()
        fill(scratch / "in", {**valid, **beside})
        sys.setprofile(note)
        how, text = outcome(reader.read, scratch / "in")
        sys.setprofile(None)
        if how != "read":
            unread.append(f"{name}: its valid input is not read: {how}: {text}")
    if unread:
        print("\n".join(unread))
        return 1
    if given.number >= 0:
        reader = table[given.readers[0]]
        fill(scratch / "in", next(inputs(reader, given.number, 1))[1])
        print(f"in {scratch}", flush=True)
        print(reader.read(scratch / "in"))
        return 0
    resource.setrlimit(resource.RLIMIT_AS, (_memory() + MEMORY, resource.RLIM_INFINITY))
    watch, rows = Watch(scratch), {}
    print(f"{'reader':<32}" + "".join(f"{column:>11}" for column in COLUMNS), flush=True)
    each = given.total / sum(reader.share for reader in table.values()) if given.total else given.inputs
    for name, reader in table.items():
        count = max(1, round(each * reader.share))
        rows[name] = row = tried(reader, count, given.seconds, scratch, watch, given.begin)
        print(f"{name:<32}" + "".join(f"{row[column]:>11,}" for column in COLUMNS), flush=True)
        for line in row["said"][:5]:
            print(f"    {line}", flush=True)
    total = {column: sum(row[column] for row in rows.values()) for column in COLUMNS}
    print(f"{'all':<32}" + "".join(f"{total[column]:>11,}" for column in COLUMNS), flush=True)
    if given.json:
        given.json.write_text(json.dumps({"rows": rows, "ran": sorted(ran)}))
    shutil.rmtree(scratch, ignore_errors=True)
    return 1 if any(row["said"] for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
