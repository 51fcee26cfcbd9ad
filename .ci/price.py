"""What the house costs: lines of code by room, lines that one command alone uses, and what a run goes through.

    python .ci/price.py                         this checkout
    python .ci/price.py --root=../before        another
    python .ci/price.py --trace                 also runs jaxcrit analyze and counts the files it goes through

A line of code is a physical line that is no docstring, no comment, no blank and no part of an import. Lines of one
command: those of top-level definitions (functions, classes, constants) that its module reaches, by names and attributes
through imports, and that no other command reaches: what would go if the command went, its Python function and its
experiments with it.
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import subprocess
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

_TRACE = """
import contextlib, os, sys
root = sys.argv[1]
sys.path.insert(0, root)
files, functions = set(), set()
def note(frame, event, argument):
    name = frame.f_code.co_filename
    if event == "call" and name.startswith(os.path.join(root, "jaxcrit")) and frame.f_code.co_name != "<module>":
        files.add(name)
        functions.add((name, frame.f_code.co_name, frame.f_code.co_firstlineno))
import importlib, re
entry = re.search(r"jaxcrit=(jaxcrit[\\w.]*):main", open(os.path.join(root, "setup.py")).read()).group(1)
main = importlib.import_module(entry).main
sys.setprofile(note)
code = main(["analyze", "--data=demo:arithmetic", "--limit=20", "--out=" + sys.argv[2]])
sys.setprofile(None)
print(len(files), len(functions), file=sys.stderr)
"""


def code_lines(tree: ast.AST, text: str) -> set[int]:
    """Numbers of the lines of code of a module."""
    kept = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.ENDMARKER,
        ):
            kept.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            kept -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                kept -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return kept


class Module:
    """One file: its definitions, what its names mean, and its lines of code."""

    def __init__(self, name: str, text: str):
        self.name, self.tree = name, ast.parse(text)
        self.lines = code_lines(self.tree, text)
        self.names: dict[str, str] = {}
        self.definitions: dict[str, tuple[set[int], set[str]]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxcrit"):
                for alias in node.names:
                    self.names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        for node in self.tree.body:
            for name in _defined(node):
                lines = self.lines & set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
                for decorator in getattr(node, "decorator_list", []):
                    lines |= self.lines & set(range(decorator.lineno, node.lineno))
                old = self.definitions.get(name, (set(), set()))
                self.definitions[name] = (old[0] | lines, old[1] | set(_uses(node)))


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name))
    elif not isinstance(node, ast.Import | ast.ImportFrom | ast.If | ast.Expr):
        yield "<module>"


def _uses(node: ast.AST) -> Iterator[str]:
    """Names and dotted names within a definition, and strings that name modules."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            yield inner.id
        elif isinstance(inner, ast.Attribute):
            yield ast.unparse(inner)
        elif isinstance(inner, ast.Constant) and isinstance(inner.value, str) and inner.value.startswith("jaxcrit."):
            yield inner.value


def modules(root: Path) -> dict[str, Module]:
    """Every module of the package by name."""
    found = {}
    for file in sorted((root / "jaxcrit").rglob("*.py")):
        name = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        found[name] = Module(name, file.read_text(encoding="utf-8"))
    return found


class Graph:
    """Which definition reaches which."""

    def __init__(self, found: dict[str, Module]):
        self.modules = found

    def resolve(self, name: str) -> list[tuple[str, str]]:
        """Definitions behind a full name, re-exports followed; all of a module where it is one."""
        if name in self.modules:
            return [(name, one) for one in self.modules[name].definitions]
        module, _, last = name.rpartition(".")
        if module in self.modules:
            one = self.modules[module]
            if last in one.definitions:
                return [(module, last)]
            if last in one.names and one.names[last] != name:
                return self.resolve(one.names[last])
        return []

    def reached(self, start: list[tuple[str, str]]) -> set[tuple[str, str]]:
        """Everything that definitions lead to, they included."""
        seen: set[tuple[str, str]] = set()
        left = list(start)
        while left:
            place = left.pop()
            if place in seen:
                continue
            seen.add(place)
            module = self.modules[place[0]]
            for use in module.definitions[place[1]][1]:
                head, _, rest = use.partition(".")
                if head in module.definitions:
                    left.append((module.name, head))
                if head in module.names:
                    full = module.names[head]
                    if full in self.modules and rest:
                        left += self.resolve(f"{full}.{rest.partition('.')[0]}")
                    elif full in self.modules:
                        continue
                    else:
                        left += self.resolve(full)
                if use.startswith("jaxcrit."):
                    left += self.resolve(use)
        return seen

    def size(self, places: set[tuple[str, str]]) -> int:
        """Lines of code of definitions."""
        return sum(len(self.modules[module].definitions[name][0]) for module, name in places)


def shares(graph: Graph) -> dict[str, int]:
    """Lines that one command alone uses, by command."""
    room = "jaxcrit.commands" if "jaxcrit.commands.main" in graph.modules else "jaxcrit.cli"
    beside = {"main", "flags", "progress", "completion", "shared", "reference"}
    commands = [name for name in graph.modules if name.startswith(f"{room}.") and name.rpartition(".")[2] not in beside]
    reached = {name: graph.reached(graph.resolve(name)) for name in commands}
    return {
        name.rpartition(".")[2]: graph.size(
            mine - set().union(*(other for one, other in reached.items() if one != name))
        )
        for name, mine in reached.items()
    }


def main(arguments: list[str]) -> int:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--trace", action="store_true", help="run jaxcrit analyze and count what it goes through")
    given = parser.parse_args(arguments)
    root = given.root.resolve()
    graph = Graph(modules(root))
    rooms: dict[str, int] = defaultdict(int)
    for name, one in graph.modules.items():
        rooms[name.split(".")[1] if "." in name else "jaxcrit"] += len(one.lines)
    for room, count in rooms.items():
        print(f"{room:<12} {count:>6}")
    print(f"{'code lines':<12} {sum(rooms.values()):>6}")
    alone = shares(graph)
    for name, count in sorted(alone.items(), key=lambda pair: pair[1]):
        print(f"  {name:<12} {count:>5} lines of its own")
    print(f"median of {len(alone)} commands: {statistics.median(alone.values()):.0f}")
    kept = [file for part in ("jaxcrit", "tests", "experiments", "benchmarks") for file in (root / part).rglob("*.py")]
    skips = sum(file.read_text(encoding="utf-8").count("# fmt: " + "skip") for file in kept)
    print(f"lines kept from the formatter: {skips}")
    if given.trace:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, "-c", _TRACE, str(root), f"{folder}/run"],
                capture_output=True,
                text=True,
                check=True,
                cwd=folder,
            )
        files, functions = done.stderr.split()[-2:]
        print(f"jaxcrit analyze goes through {files} files and {functions} functions of the package")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
