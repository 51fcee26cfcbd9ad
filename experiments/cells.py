"""What experiments of many cells share: rows that resume, rows of fitting length, minutes by part."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxcrit.core.errors import UserError
from jaxcrit.core.files import json_lines, plain, read_json, remove_tree, write_json, write_text
from jaxcrit.core.groups import FinetuneOptions
from jaxcrit.core.hashing import sample_id, sha256_json
from jaxcrit.core.pages import peak_gib
from jaxcrit.models.model import Model
from jaxcrit.reporting.tables import aligned

CELL, SETTINGS, TIMES = "jaxcrit.cell", "jaxcrit.cells", "jaxcrit.cell_times"


@dataclasses.dataclass(frozen=True)
class Cells:
    """A directory of cells of one experiment: ``settings.json``, ``cells/NAME.json``, ``times.json``.

    Attributes:
        out: the directory.
    """

    out: Path

    @classmethod
    def open(cls, out: Path, settings: Mapping[str, Any]) -> Cells:
        """Makes the directory, or goes on in it.

        Args:
            out: absent, empty, or of cells with the same settings.
            settings: JSON values: all that determines results, hashes of model and rows among them.

        Raises:
            UserError: other settings; the message names the first that differs.
        """
        path, asked = out / "settings.json", plain(dict(settings))
        if path.exists():
            kept = read_json(path, SETTINGS)
            for key in asked:
                if kept.get(key) != asked[key]:
                    raise UserError(
                        f"--out={out}: was begun with {key} {_short(kept.get(key))}, now {_short(asked[key])};"
                        " choose another --out"
                    )
        else:
            out.mkdir(parents=True, exist_ok=True)
            write_json(path, SETTINGS, asked)
        return cls(out)

    def __call__(self, name: str, make: Callable[[], Mapping[str, Any]], scratch: Path | None = None) -> dict[str, Any]:
        """The content of a cell: what was kept, or what ``make`` gives, which is kept before it is given.

        A cell that is written is never made again; one that was interrupted starts where its own runs left off.

        Args:
            name: of its file.
            make: gives what is kept.
            scratch: directory of runs that only ``make`` needs; removed whole, once the cell is kept. An interruption
                before that resumes in it, and a cell that is deleted later is made from nothing.
        """
        path = self.out / "cells" / f"{name}.json"
        if not path.exists():
            began = time.perf_counter()
            content = plain(dict(make()))
            path.parent.mkdir(parents=True, exist_ok=True)
            before, seconds = self.spent(), round(time.perf_counter() - began, 1)
            spent = {"seconds": {**before["seconds"], name: seconds}}
            spent["peak_gib"] = max(before.get("peak_gib", 0), peak_gib())
            write_json(self.out / "times.json", TIMES, spent)
            write_json(path, CELL, content)
            print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)
        if scratch is not None:
            remove_tree(scratch)
        found: dict[str, Any] = read_json(path, CELL)
        return {key: value for key, value in found.items() if key not in ("format", "format_version")}

    def spent(self) -> dict[str, Any]:
        """``seconds`` by cell, of the call that ended it; ``peak_gib`` of all processes that made any."""
        path = self.out / "times.json"
        kept = read_json(path, TIMES) if path.exists() else {"seconds": {}}
        return {key: kept[key] for key in ("seconds", "peak_gib") if key in kept}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def fitting(model: Model, spec: str, count: int, longest: int, out: Path) -> tuple[str, str]:
    """Writes the first ``count`` rows that have a response and fit; gives them as ``--data`` takes them, and a hash.

    Args:
        model: renders them.
        spec: ``NAME:FILE`` of JSON lines.
        count: rows; all that fit where there are fewer.
        longest: tokens of a row, at most.
        out: directory for the file, which keeps its name.

    Raises:
        UserError: no such file, or none fits.
    """
    name, _, path = spec.rpartition(":")
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"{path}: expected rows as JSON lines ({error.strerror})") from None
    rows = [row for row in rows if str(row.get("output", row.get("response", "-"))).strip()]
    out.mkdir(parents=True, exist_ok=True)
    made = out / Path(path).name
    data = f"{name}:{made}" if name else str(made)
    write_text(made, json_lines(rows))
    options = FinetuneOptions(data=data, split=whole(data), duplicates="drop", max_length=longest, long="drop")
    (dataset,) = model.read(options, responses=True)
    by_id = {sample_id(row): row for row in rows}
    chosen = [by_id[one] for one in dataset.sample_ids[:count]]
    write_text(made, json_lines(chosen))
    return data, sha256_json(chosen)


def whole(data: str) -> str:
    """``--split`` for all rows of what `fitting` gave: files of no published dataset have no splits."""
    return "all" if ":" in data else ""


def minutes(times: Mapping[str, float], parts: Mapping[str, tuple[str, int]]) -> str:
    """Minutes by part: of one cell, of as many as are planned, and what those that are done took.

    Args:
        times: seconds by cell.
        parts: by part, how names of its cells begin, and how many are planned.
    """
    rows = []
    for part, (start, planned) in parts.items():
        spent = [seconds / 60 for name, seconds in times.items() if name.startswith(start)]
        each = sum(spent) / len(spent) if spent else float("nan")
        rows.append([f"{each:.1f}", str(planned), f"{each * planned:.0f}", str(len(spent)), f"{sum(spent):.0f}", part])
    rows = [[cell.replace("nan", "-") for cell in row] for row in rows]
    return "\n".join(aligned(["min a cell", "planned", "min in all", "done", "min spent", ""], rows))
