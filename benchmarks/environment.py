"""What a benchmark's result file says beside its figures: machine, versions, command."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("jaxcrit", "jax", "jaxlib", "flax", "libtpu", "numpy", "safetensors", "transformers", "torch")


def describe() -> dict[str, Any]:
    """Hardware, load, versions and the command line of this process."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE)
        cpu = named.group(1) if named else cpu
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
    }


def write_result(name: str, figures: Mapping[str, Any]) -> Path:
    """Writes ``results/NAME.json`` and returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"benchmark": name, "environment": describe(), **figures}, indent=2) + "\n")
    return path
