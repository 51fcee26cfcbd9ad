"""Plans of many jobs, one compile each, kept as they come: what a result file already has is not compiled again."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Sequence
from typing import Any

from environment import RESULTS, write_result

from jaxcrit.studies.options import PlanOptions
from jaxcrit.studies.plan import Plan, run_plan


def flags(about: str) -> argparse.ArgumentParser:
    """Flags of every benchmark of plans."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--kept", action="store_true", help="the table of what is there; compile nothing")
    return parser


def planned(name: str, asked: Sequence[PlanOptions], *, traffic: bool, kept: bool) -> list[dict[str, Any]]:
    """One row for every configuration, in their order; ``results/NAME.json`` is written after each.

    Args:
        name: of the benchmark.
        asked: what to plan.
        traffic: whether rows say what moves, besides what lies in memory.
        kept: leave out what is not there yet.
    """
    file = RESULTS / f"{name}.json"
    known = json.loads(file.read_text())["rows"] if file.exists() else []
    rows: list[dict[str, Any]] = []
    for config in asked:
        row = next((row for row in known if row["config"] == dataclasses.asdict(config)), None)
        if row is None and kept:
            continue
        if row is None:
            began = time.process_time()
            plan = run_plan(config)
            row = _memory(plan) | (_traffic(plan) if traffic else {})
            row |= {"cpu_seconds": round(time.process_time() - began, 1), "load_average": os.getloadavg()[0]}
            print(f"{config.model} {config.job} on {config.topology}: {row['wall_seconds']} s", flush=True)
        rows.append(row)
        write_result(name, {"rows": rows})
    return rows


def _memory(plan: Plan) -> dict[str, Any]:
    compiled = plan.compiled
    if compiled is None:
        raise SystemExit(f"nothing was compiled: {'; '.join(plan.notes)}")
    return {
        "config": dataclasses.asdict(plan.config),
        "devices": plan.topology.devices,
        "fits": plan.fits,
        "peak": plan.peak,
        "state": sum(plan.memory.values()),
        "temporaries": plan.temporaries,
        "arguments_compiled": compiled.arguments,
        "temporaries_compiled": compiled.temporaries,
        "wall_seconds": compiled.seconds,
    }


def _traffic(plan: Plan) -> dict[str, Any]:
    return {
        "flops": plan.flops,
        "moved": plan.moved,
        "exchanged": plan.exchanged,
        "collectives": plan.compiled.collectives if plan.compiled else {},
        "seconds": plan.seconds,
    }


def write_table(name: str, lines: Sequence[str]) -> None:
    """Prints a table, and writes it beside the rows as ``results/NAME.txt``."""
    text = "\n".join(lines) + "\n"
    (RESULTS / f"{name}.txt").write_text(text)
    print(text, end="")
