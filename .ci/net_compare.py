"""Compares two recordings, command by command: exit code, text, every file, and what jax did for it."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import os
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from net_list import SHORT
from net_record import Place, costs
from net_step import Step

DROPPED = ("time", "times", "digests", "seconds", "cpu_seconds")
RUN_KEYS = ("command", "status", "config", "determines", "trained", "result")
COUNTED = ("compiles", "runs", "flops", "temporaries", "jax")
MORE_MEMORY = 1.1
# A row of the table that pages make of run.json.
_ROW = re.compile(r"<tr><td><code>([^<]*)</code></td><td>[^<]*</td></tr>")
# What differs between two runs of one checkout, and what stands for it. Orders matter: the first takes its text away.
_NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
_TIMES = (
    (re.compile(rf"{_NUMBER} ?[\w ]{{0,30}}/s\b"), "RATE"),
    (re.compile(r"\b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?Z?)?"), "DATE"),
    (re.compile(rf"\b{_NUMBER} ?(?:s|ms|seconds?|minutes?|min|hours?|h)\b(?!\.e)"), "TIME"),
    (re.compile(r"localhost:\d+|127\.0\.0\.1:\d+"), "PORT"),
    (re.compile(r"^[IWEF]\d{4} \S+ +\d+ [^\]]+\]", re.M), "LOG"),
)
# Gloo, which carries the collectives of CPUs, says from several threads at once of whom it met.
_GLOO = re.compile(r"Gloo|peer ranks|^[\s\d:]*$")


@dataclasses.dataclass(frozen=True)
class Difference:
    """One thing that differs.

    Attributes:
        path: a file, or what begins with @: @exit, @stdout, @stderr, @compiles, ...
        what: in a few words.
    """

    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.path} ({self.what})"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of one command.

    Attributes:
        command: its name.
        differences: all of them.
        cost: what it cost after; empty where that is a matter of chance.
        memory: its peak after, over that before; None where it was not compared.
    """

    command: str
    differences: list[Difference]
    cost: dict[str, Any]
    memory: float | None


def compared(step: Step, before: Place, after: Place) -> Iterator[Verdict]:
    """Verdicts on the commands of a step that both have recorded."""
    names = list(step.commands(SHORT))
    if step.stop:
        stopped = names[0] + ".stopped"
        yield Verdict(stopped, list(_said(stopped, before, after, places=True)), {}, None)
    for name in names:
        found = list(_said(name, before, after, timed=step.timed))
        for number in range(1, step.processes):
            found += _said(f"{name}.process{number}", before, after)
        found += _files(name, before, after)
        old, new = costs(before, name), costs(after, name)
        if not step.steady:
            yield Verdict(name, found, {}, None)
            continue
        for key in COUNTED:
            if old.get(key) != new.get(key):
                found.append(
                    Difference(f"@{key}", _programs(old, new) if key in ("compiles", "runs") else _pair(old, new, key))
                )
        # Later commands of a process begin with what earlier ones have left, by chance more or less.
        alike = name == names[0] and "peak" in old and "peak" in new
        ratio = new["peak"] / old["peak"] if alike else None
        yield Verdict(name, found, new, ratio)


def _pair(old: Mapping[str, Any], new: Mapping[str, Any], key: str) -> str:
    return f"{old.get(key)} before, {new.get(key)} after"


def _programs(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Totals, and the first compiled functions by whose name they differ."""
    programs = [one.get("programs", {}) for one in (old, new)]
    names = [name for name in sorted(programs[0] | programs[1]) if programs[0].get(name) != programs[1].get(name)]
    shown = [f"{name} {'/'.join(map(str, one.get(name, [0, 0])))}" for name in names[:3] for one in programs]
    both = [f"{one.get('compiles')}/{one.get('runs')}" for one in (old, new)]
    return f"compiles/runs {both[0]} before, {both[1]} after: {', '.join(shown)}{' …' if len(names) > 3 else ''}"


def _said(name: str, before: Place, after: Place, *, timed: bool = True, places: bool = False) -> Iterator[Difference]:
    """Differences of exit code, standard output and standard error.

    Args:
        name: of the command, or of one of its processes.
        before: one recording.
        after: the other.
        timed: whether times in it are of this machine.
        places: whether numbers say only where a signal came.
    """
    if costs(before, name)["exit"] != costs(after, name)["exit"]:
        yield Difference("@exit", _pair(costs(before, name), costs(after, name), "exit"))
    for kind, word in (("out", "@stdout"), ("err", "@stderr")):
        texts = []
        for place in (before, after):
            file = place.records / f"{name}.{kind}"
            text = normal(file.read_bytes().decode("utf-8", "replace") if file.exists() else "", place, timed=timed)
            text = "\n".join(line for line in text.splitlines() if not _GLOO.search(line) or not line.strip())
            texts.append(re.sub(r"\d+", "N", text) if places else text)
        if texts[0] != texts[1]:
            yield Difference(word, first_difference(*texts))


def normal(text: str, place: Place, *, timed: bool = True) -> str:
    """A text without what differs from run to run: where it ran, and where it is timed, when and how fast."""
    for path, word in ((place.scratch, "SCRATCH"), (place.path, "RECORDING"), (place.checkout, "CHECKOUT")):
        text = text.replace(str(path), word)
    text = text.replace(sys.prefix, "PREFIX")
    text = re.sub(r"CHECKOUT/\S+\.py:\d+", "CHECKOUT", text)
    if not timed:
        return text
    lines = []
    for line in text.split("\n"):
        changed = line
        for pattern, word in _TIMES:
            changed = pattern.sub(word, changed)
        lines.append(line if changed == line else re.sub(r" {2,}", " ", changed))  # columns move with their widths
    return "\n".join(lines)


def first_difference(old: str, new: str) -> str:
    """The first line that differs, in both texts."""
    before, after = old.splitlines(), new.splitlines()
    for number, (one, other) in enumerate(zip(before, after, strict=False), 1):
        if one != other:
            return f"line {number}: {one.strip()[:100]!r} before, {other.strip()[:100]!r} after"
    longer, when = (before, "before") if len(before) > len(after) else (after, "after")
    number = min(len(before), len(after))
    if number == len(longer):
        return "white space at the ends of lines"
    return f"line {number + 1} only {when}: {longer[number].strip()[:100]!r}"


def _files(name: str, before: Place, after: Place) -> Iterator[Difference]:
    old, new = (_listing(place.scratch / name) for place in (before, after))
    for path in sorted(old.keys() | new.keys()):
        if path not in new or path not in old:
            yield Difference(path, f"only {'before' if path in old else 'after'}")
        elif what := _file(path, old[path], new[path], before, after):
            yield Difference(path, what)


def _listing(path: Path) -> dict[str, Path | None]:
    """Files by name below a run directory, or one file by its own; None for what only has to be there."""
    if path.is_file():
        return {path.name: path}
    found: dict[str, Path | None] = {}
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder, name)
            shown = str(file.relative_to(path))
            # orbax names its files by chance; what is in them is compared as an export.
            if checkpoint := re.match(r"(.*?checkpoints/[^/]+)/", shown):
                found[checkpoint[1]] = None
            elif name.startswith("events.out.tfevents"):
                found[str(Path(shown).with_name("events.out.tfevents"))] = None
            else:
                found[shown] = None if file.suffix == ".png" else file
    return found


def _file(name: str, old: Path | None, new: Path | None, before: Place, after: Place) -> str:
    """How a file differs; empty where it does not."""
    if old is None or new is None:
        return ""
    contents = old.read_bytes(), new.read_bytes()
    if contents[0] == contents[1]:
        return ""
    try:
        if name.endswith(".npz"):
            return arrays_differ(*(_npz(content) for content in contents))
        if name.endswith(".safetensors"):
            return arrays_differ(
                *(_safetensors(content, place) for content, place in zip(contents, (before, after), strict=True))
            )
        texts = [
            normal(content.decode("utf-8"), place) for content, place in zip(contents, (before, after), strict=True)
        ]
        if name.endswith(".json"):
            keep = _of_run if name.rpartition("/")[2] == "run.json" else _timeless
            return values_differ(*(keep(json.loads(text)) for text in texts))
        if name.endswith(".jsonl"):
            return values_differ(*([_timeless(json.loads(row)) for row in text.splitlines()] for text in texts))
        if name.endswith(".html"):
            texts = [visible(text) for text in texts]
        return "" if texts[0] == texts[1] else first_difference(*texts)
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        return f"bytes; cannot be read: {error!r}"


def visible(page: str) -> str:
    """The text that a reader of a page sees, a line for each element; of its table of run.json, what is compared."""
    page = _ROW.sub(lambda row: row[0] if _kept(html.unescape(row[1])) else "", page)
    page = re.sub(r"(?s)<(script|style|head)\b.*?</\1>|<!--.*?-->", "", page)
    lines = (" ".join(line.split()) for line in html.unescape(re.sub(r"<[^>]*>", "\n", page)).splitlines())
    return "\n".join(line for line in lines if line)


def _kept(key: str) -> bool:
    """Whether an entry of run.json, such as ``config.window``, is compared."""
    parts = key.split(".")
    return (parts[0] in RUN_KEYS or key in ("model.path", "model.hash")) and not set(parts) & set(DROPPED)


def _timeless(value: Any) -> Any:
    """A JSON value without the keys of `DROPPED`."""
    if isinstance(value, dict):
        return {key: _timeless(one) for key, one in value.items() if key not in DROPPED}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


def _of_run(run: dict[str, Any]) -> dict[str, Any]:
    """What of ``run.json`` is compared."""
    model = run.get("model")
    kept = {key: run[key] for key in RUN_KEYS if key in run}
    if isinstance(model, dict):
        kept["model"] = {key: model[key] for key in ("path", "hash") if key in model}
    return dict(_timeless(kept))


def values_differ(old: Any, new: Any) -> str:
    """How two JSON values differ: where first, how often, and by how much where numbers do."""
    places: list[str] = []
    largest = 0.0

    def walk(one: Any, other: Any, path: str) -> None:
        nonlocal largest
        if isinstance(one, dict) and isinstance(other, dict):
            for key in [*one, *(key for key in other if key not in one)]:
                if key not in one or key not in other:
                    places.append(f"{path}.{key} only {'before' if key in one else 'after'}")
                else:
                    walk(one[key], other[key], f"{path}.{key}")
        elif isinstance(one, list) and isinstance(other, list):
            if len(one) != len(other):
                places.append(f"{path}: {len(one)} entries before, {len(other)} after")
            for number, pair in enumerate(zip(one, other, strict=False)):
                walk(*pair, f"{path}[{number}]")
        elif type(one) is not type(other) or repr(one) != repr(other):
            places.append(f"{path}: {str(one)[:60]} before, {str(other)[:60]} after")
            if all(isinstance(value, int | float) for value in (one, other)):
                largest = max(largest, abs(one - other))

    walk(old, new, "")
    if not places:
        return ""
    more = f" and {len(places) - 2} more" if len(places) > 2 else ""
    return f"{'; '.join(place.lstrip('.') for place in places[:2])}{more}" + _by(largest)


def _by(largest: float) -> str:
    return f"; largest difference {largest:.3g}" if largest else ""


def arrays_differ(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """How two sets of arrays differ: which, and by how much at most. What is no array is JSON."""
    found, largest = [], 0.0
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            found.append(f"{name} only {'before' if name in old else 'after'}")
            continue
        one, other = old[name], new[name]
        if not isinstance(one, np.ndarray) or not isinstance(other, np.ndarray):
            if what := values_differ(_timeless(one), _timeless(other)):
                found.append(f"{name}: {what}")
        elif one.shape != other.shape or one.dtype != other.dtype:
            found.append(f"{name}: {one.dtype}{list(one.shape)} before, {other.dtype}{list(other.shape)} after")
        elif one.tobytes() != other.tobytes():
            found.append(name)
            if one.dtype.kind in "biuf" and one.size:
                gap = np.abs(one.astype(np.float64) - other.astype(np.float64))
                largest = max(largest, float(np.nanmax(gap)) if not np.isnan(gap).all() else np.inf)
    return "" if not found else ", ".join(found[:4]) + (" …" if len(found) > 4 else "") + _by(largest)


def _npz(content: bytes) -> dict[str, Any]:
    with np.load(io.BytesIO(content)) as file:
        return {name: json.loads(str(file[name])) if name == "meta" else file[name] for name in file.files}


_WIDTHS: dict[str, Callable[[bytes], np.ndarray]] = {
    "F64": lambda raw: np.frombuffer(raw, np.float64),
    "F32": lambda raw: np.frombuffer(raw, np.float32),
    "F16": lambda raw: np.frombuffer(raw, np.float16),
    "BF16": lambda raw: (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32),
}


def _safetensors(content: bytes, place: Place) -> dict[str, Any]:
    """Tensors and metadata, which the library writes in any order."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(normal(content[8 : 8 + length].decode(), place)), content[8 + length :]
    found: dict[str, Any] = {"__metadata__": header.pop("__metadata__", {})}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        read = _WIDTHS.get(entry["dtype"], lambda raw: np.frombuffer(raw, np.uint8))
        found[name] = read(data[start:stop])
        found[f"{name} as"] = [entry["dtype"], entry["shape"]]
    return found


@dataclasses.dataclass
class Allowed:
    """Lines ``command: path-glob: reason`` of a file; a command may be a glob too.

    Attributes:
        rules: command and path globs.
        used: of each rule, whether it has allowed anything.
    """

    rules: list[tuple[str, str]]
    used: list[bool]

    @classmethod
    def read(cls, path: Path) -> Allowed:
        """Reads the file.

        Raises:
            ValueError: a line has no reason.
        """
        rules = []
        for number, line in enumerate(path.read_text("utf-8").splitlines() if path.exists() else [], 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            parts = [part.strip() for part in line.split(":", 2)]
            if len(parts) < 3 or not all(parts):
                raise ValueError(f"{path}, line {number}: expected command: path-glob: reason, got {line!r}")
            rules.append((parts[0], parts[1]))
        return cls(rules, [False] * len(rules))

    def covers(self, command: str, path: str) -> bool:
        """Whether a difference may be."""
        fitting = [
            n for n, (who, what) in enumerate(self.rules) if fnmatchcase(command, who) and fnmatchcase(path, what)
        ]
        for number in fitting:
            self.used[number] = True
        return bool(fitting)
