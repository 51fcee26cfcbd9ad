"""Lists every assertion of the tests by the name of its test, and says which were lost since another checkout.

    python .ci/asserts.py                       a line each: test, what it asserts
    python .ci/asserts.py --against=../before   what was lost and what was added; exit 1 if something was lost

Counted are ``assert``, ``pytest.raises``, ``np.testing.assert_*`` and helpers of the tests named ``assert_*`` or
``refuse*``. Files may move: only names of functions count. Module paths of the package within a statement are ignored.
A loss that is meant stands in ``.ci/asserts_allow.txt``: ``test name: reason``, a line each.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_CALL = re.compile(r"^(pytest\.raises|np\.testing\.assert_\w+|assert_\w+|refuse\w*|refusal)$")


def assertions(root: Path) -> Counter[tuple[str, str]]:
    """(test, statement) with how often it stands there, over all files below ``root/tests``."""
    found: Counter[tuple[str, str]] = Counter()
    for file in sorted((root / "tests").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for name, function in _functions(tree):
            found.update((name, _plain(text)) for text in _statements(function))
    return found


def _functions(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{name}", inner) for name, inner in _functions(node))


def _statements(function: ast.AST) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            yield ast.unparse(node.test)
        elif isinstance(node, ast.Call) and _CALL.match(ast.unparse(node.func)):
            yield ast.unparse(node)


def _plain(text: str) -> str:
    return re.sub(r"jaxcrit(\.\w+)+", "jaxcrit", text)


def allowed(file: Path) -> dict[str, str]:
    """Reasons by name of the test."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    pairs = [line.partition(":") for line in lines if line.strip() and not line.startswith("#")]
    return {name.strip(): reason.strip() for name, _, reason in pairs}


def main(arguments: list[str]) -> int:
    """Prints; 1 where an assertion was lost without a reason."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="checkout from before")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1])
    given = parser.parse_args(arguments)
    now = assertions(given.root)
    if given.against is None:
        for (name, text), count in sorted(now.items()):
            print(f"{name}: {text}" + (f" (x{count})" if count > 1 else ""))
        return 0
    before, reasons = assertions(given.against), allowed(given.root / ".ci" / "asserts_allow.txt")
    lost, added = before - now, now - before
    fresh = {name for name, _ in added}
    unexplained = 0
    for (name, text), count in sorted(lost.items()):
        reason = reasons.get(name, "")
        unexplained += not reason
        print(f"{'allowed' if reason else 'LOST'} {name}: {text}" + (f" (x{count})" if count > 1 else ""))
        if name in fresh and not reason:
            print(f"     now {'; '.join(text for (other, text) in added if other == name)[:300]}")
    totals = f"{sum(before.values())} before, {sum(now.values())} now; {sum(lost.values())} lost or reworded"
    print(f"{totals}, {unexplained} of these without a reason; {sum(added.values())} new")
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
