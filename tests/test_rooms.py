"""Rooms: imports run downwards only, lazy ones and those for the type checker included."""

from __future__ import annotations

import ast
from pathlib import Path

import jaxcrit

ROOT = Path(jaxcrit.__file__).parent
ROOMS = (
    "core",
    "similarity",
    "selection",
    "parallel",
    "data",
    "models",
    "evaluation",
    "training",
    "evidence",
    "criteria",
    "studies",
    "reporting",
    "commands",
    "api",
)
NO_JAX = ("core/options.py", "core/groups.py", "core/errors.py")


def imports(file: Path):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def room_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "jaxcrit" and parts[1] in ROOMS else ""


def test_every_file_is_in_a_room():
    there = {path.name for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert there == set(ROOMS) - {"api"}
    assert {path.stem for path in ROOT.glob("*.py")} == {"__init__", "__main__", "api"}


def test_imports_run_downwards_only():
    upwards = []
    for file in sorted(ROOT.rglob("*.py")):
        if file.name in ("__init__.py", "__main__.py") and file.parent == ROOT:
            continue
        room = file.relative_to(ROOT).parts[0].removesuffix(".py")
        for name, line in imports(file):
            other = room_of(name)
            if other and ROOMS.index(other) > ROOMS.index(room):
                upwards.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    assert upwards == []


def test_selection_takes_scores_and_core_alone():
    for file in (ROOT / "selection").glob("*.py"):
        assert {room_of(name) for name, _ in imports(file)} <= {"", "core", "selection"}, file.name


def test_similarity_is_private_behind_its_room():
    for file in ROOT.rglob("*.py"):
        if file.parent.name != "similarity":
            assert not [name for name, _ in imports(file) if name.startswith("jaxcrit.similarity._")], file


def test_what_help_needs_imports_no_arrays():
    for name in NO_JAX:
        found = {imported.partition(".")[0] for imported, _ in imports(ROOT / name)}
        assert not found & {"jax", "numpy", "flax"}, name
