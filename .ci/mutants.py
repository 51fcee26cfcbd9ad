"""Changes a room of the package in small ways, one at a time, and says which changes none of its tests notices.

    python .ci/mutants.py similarity selection --sample=200 --out=mutants.jsonl     goes on where it stopped
    python .ci/mutants.py similarity selection --out=mutants.jsonl --table          only the table of what was found
    python .ci/mutants.py similarity selection --out=mutants.jsonl --again          survivors anew, after new tests

A mutant is one changed operator, comparison, number, condition or choice of a function (min for max). Left out are
texts and whatever is raised or told, types, what decorates, and sizes of tiles. The sample is drawn by a seed. Each
mutant is tried in a process of its own, forked when jax is loaded; the tests that name its module come first, and the
first that fails ends it. Nothing is written to the checkout.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_COMPUTED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
_CHOSEN = {
    "min": "max", "minimum": "maximum", "any": "all", "argmin": "argmax", "floor": "ceil", "sum": "mean",
    "zeros": "ones", "zeros_like": "ones_like", "triu": "tril", "argsort": "argmax", "cumsum": "cumprod",
}  # fmt: skip
_CHOSEN |= {other: one for one, other in _CHOSEN.items() if one not in ("argsort", "sum")}
# Names of what only costs; and constants of this kind, which decide nothing but how the same is computed.
_SIZES = re.compile(r"(?<!quan)tile|chunk|block|batch|bytes|cache|maxsize|pieces|^_?(STRIP|UNPACKED|CPU_ROWS)$", re.I)
_CONSTANTS = re.compile(r"_?[A-Z_]*(BLOCK|STRIP|UNPACKED|CPU_ROWS|BYTES|TILE|RESIDENT_SAMPLES|KEPT_SAMPLES)[A-Z_]*")
_TYPES = ("dtype", "static_argnames", "static_argnums", "donate_argnums", "stacklevel")
_TOLD = ("UserError", "DegenerateError", "warn", "warning", "cast", "TypeVar", "dataclass", "field", "repr")
_LIMIT = 300  # seconds of a mutant


class Sites(ast.NodeVisitor):
    """Nodes of a module that can be changed, each with what it becomes."""

    def __init__(self) -> None:
        self.found: list[tuple[ast.AST, str]] = []

    def visit(self, node: ast.AST) -> None:
        """Looks at a node and what is in it, but for texts, types and sizes."""
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Assert):
            return
        if isinstance(node, ast.Call) and _name(node.func) in _TOLD:
            return
        if isinstance(node, ast.keyword) and (node.arg in _TYPES or (node.arg and _SIZES.search(node.arg))):
            return
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(one, ast.Name) and _SIZES.search(one.id) for one in targets):
                return
        if isinstance(node, ast.expr) and any(_CONSTANTS.fullmatch(_name(one)) for one in ast.walk(node)):
            return
        if isinstance(node, ast.Subscript) and _name(node.value) in ("Literal", "tuple", "list", "dict", "Callable"):
            return
        self._changes(node)
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, ast.AST):
                    self.visit(one)

    def _changes(self, node: ast.AST) -> None:
        if isinstance(node, ast.Compare):
            self.found += [(node, f"compare {n}") for n, one in enumerate(node.ops) if type(one) in _COMPARED]
        elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _COMPUTED:
            self.found.append((node, "compute"))
        elif isinstance(node, ast.BoolOp):
            self.found.append((node, "and or"))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            self.found.append((node, "drop"))
        elif isinstance(node, ast.If | ast.IfExp | ast.While) and "TYPE_CHECKING" not in ast.dump(node.test):
            self.found.append((node, "negate"))
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
            self.found.append((node, "number"))
        elif isinstance(node, ast.Call) and _name(node.func) in _CHOSEN:
            self.found.append((node, "choose"))


def _name(node: ast.AST) -> str:
    return getattr(node, "attr", getattr(node, "id", ""))


def changed(node: Any, how: str) -> ast.AST:
    """The node in place of the one that is there; the tree may be changed."""
    if how.startswith("compare"):
        place = int(how.split()[1])
        node.ops[place] = _COMPARED[type(node.ops[place])]()
    elif how == "compute":
        node.op = _COMPUTED[type(node.op)]()
    elif how == "and or":
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif how == "drop":
        return node.operand
    elif how == "negate":
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif how == "number":
        value = node.value
        node.value = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 2 or 1.0
    elif isinstance(node.func, ast.Attribute):
        node.func.attr = _CHOSEN[node.func.attr]
    else:
        node.func.id = _CHOSEN[node.func.id]
    return node


class Put(ast.NodeTransformer):
    """Puts a changed node in its place."""

    def __init__(self, node: ast.AST, how: str) -> None:
        self.node, self.how = node, how

    def visit(self, node: ast.AST) -> Any:
        """The node or what it becomes."""
        return changed(node, self.how) if node is self.node else self.generic_visit(node)


def mutant(file: Path, number: int) -> tuple[str, ast.Module]:
    """One of a file: its line as it was and is, and the changed module."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    node, how = _sites(tree)[number]
    before = ast.unparse(_shown(node))
    line = node.lineno  # type: ignore[attr-defined]
    after = ast.unparse(_shown(changed(copy.deepcopy(node), how)))
    whole = ast.fix_missing_locations(Put(node, how).visit(tree))
    return f"{file.relative_to(ROOT)}:{line} #{number}: {before} -> {after}", whole


def _shown(node: ast.AST) -> ast.AST:
    """What of a node is shown: of a statement with a body its condition."""
    return node.test if isinstance(node, ast.If | ast.While) else node


def _sites(tree: ast.Module) -> list[tuple[ast.AST, str]]:
    sites = Sites()
    sites.visit(tree)
    return sites.found


class Instead(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives the mutant where its module is imported."""

    def __init__(self, module: str, file: Path, tree: ast.Module) -> None:
        self.module, self.file, self.tree = module, file, tree

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The mutant's, for its own name."""
        places = [str(self.file.parent)] if self.file.name == "__init__.py" else None
        if name != self.module:
            return None
        return importlib.util.spec_from_file_location(name, self.file, loader=self, submodule_search_locations=places)

    def exec_module(self, module: Any) -> None:
        """Runs it."""
        exec(compile(self.tree, str(self.file), "exec"), module.__dict__)


def tests_for(room: str, file: Path) -> list[str]:
    """Test files of a room, those that speak of the module first."""
    stem = file.stem.strip("_")
    public = [node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]

    def rank(test: Path) -> int:
        text = test.read_text(encoding="utf-8")
        named = sum(len(re.findall(rf"\b{name}\b", text)) for name in public)
        return -100 * (stem in test.stem) - min(named, 20)

    return [str(test.relative_to(ROOT)) for test in sorted((ROOT / "tests" / room).glob("test_*.py"), key=rank)]


def tried(tests: list[str], finder: Instead | None, limit: int) -> tuple[str, str]:
    """Runs tests in a forked process; ``killed``, ``survived`` or ``timeout``, and the test that failed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        import pytest

        failed: list[str] = []

        class Notes:
            def pytest_runtest_logreport(self, report: Any) -> None:
                if report.failed:
                    failed.append(report.nodeid)

            def pytest_collectreport(self, report: Any) -> None:
                if report.failed:
                    failed.append(report.nodeid)

        if finder:
            sys.meta_path.insert(0, finder)
        code: int = 3
        try:
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[Notes()]))
        finally:
            os.write(writing, json.dumps([code, failed[:1]]).encode())
            os._exit(0)
    os.close(writing)
    end = time.monotonic() + limit
    try:
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                said = os.read(reading, 2**16)
                code, failed = json.loads(said) if said else (status, ["the process died"])
                return ("survived" if code == 0 else "killed"), "".join(failed) or f"exit code {code}"
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "timeout", ""
            time.sleep(0.05)
    finally:
        os.close(reading)


def main() -> int:
    """Draws, tries, prints."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("rooms", nargs="+")
    asked.add_argument("--sample", type=int, default=200)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--limit", type=int, default=_LIMIT, help="seconds of a mutant")
    asked.add_argument("--out", type=Path, default=Path("mutants.jsonl"))
    asked.add_argument("--least", type=float, default=0.0, help="share that must be killed, in percent")
    asked.add_argument("--again", action="store_true", help="try survivors once more")
    asked.add_argument("--table", action="store_true", help="try nothing")
    asked.add_argument("--part", default="1/1", help="1/2 tries every other one")
    given = asked.parse_args()
    every = [
        (room, file, number)
        for room in given.rooms
        for file in sorted((ROOT / "jaxcrit" / room).rglob("*.py"))
        for number in range(len(_sites(ast.parse(file.read_text(encoding="utf-8")))))
    ]
    chosen = random.Random(given.seed).sample(every, min(given.sample, len(every)))
    drawn = [(room, file, *mutant(file, number)) for room, file, number in chosen]
    known: dict[str, dict[str, Any]] = {}
    for file in sorted(given.out.parent.glob(f"{given.out.name}*")):
        known |= {row["mutant"]: row for row in map(json.loads, file.read_text().splitlines())}
    print(f"{len(every)} mutants, {len(drawn)} drawn with seed {given.seed}, {len(known)} known", flush=True)
    if not given.table:
        _load()
        part, parts = map(int, given.part.split("/"))
        for room in given.rooms:  # what fails as it is notices everything
            result, by = tried([f"tests/{room}"], None, 10 * given.limit)
            if result != "survived":
                print(f"the tests of {room} do not pass as they are: {result} {by}")
                return 1
        todo = [row for n, row in enumerate(drawn) if n % parts == part - 1]
        for room, file, name, tree in todo:
            if name in known and not (given.again and known[name]["result"] == "survived"):
                continue
            began = time.monotonic()
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            tests = tests_for(room, file)
            result, by = tried(tests, Instead(module, file, tree), given.limit)
            row = {"mutant": name, "result": result, "by": by, "seconds": round(time.monotonic() - began, 1)}
            known[name] = row
            with given.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
            print(f"{result:<9} {row['seconds']:6.1f} s  {name}  {by}", flush=True)
    return _told([known[name] for _, _, name, _ in drawn if name in known], len(drawn), given.least)


def _load() -> None:
    """What every test needs, once, but for a backend of jax, whose threads a fork would lose."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.chdir(ROOT)
    os.environ |= {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
    if cache := os.environ.get("JAXCRIT_TEST_CACHE"):
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    import jax
    import jax.experimental  # noqa: F401
    import numpy  # noqa: F401
    import scipy.linalg
    import scipy.stats  # noqa: F401


def _told(rows: list[dict[str, Any]], drawn: int, least: float) -> int:
    count = {result: sum(row["result"] == result for row in rows) for result in ("killed", "timeout", "survived")}
    print("\nsurvivors:")
    for row in rows:
        if row["result"] == "survived":
            print(f"  {row['mutant']}")
    share = 100 * (count["killed"] + count["timeout"]) / max(1, len(rows))
    print(
        f"{len(rows)} of {drawn} tried: {count['killed']} killed, {count['timeout']} by the time limit,"
        f" {count['survived']} survived: {share:.1f} % killed"
    )
    return 0 if len(rows) == drawn and share >= least else 1


if __name__ == "__main__":
    sys.exit(main())
