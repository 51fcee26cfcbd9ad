"""``python -m jaxcrit.criteria [FILE]`` prints the table of criteria, or brings that in a Markdown file up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from jaxcrit.core.errors import UserError
from jaxcrit.criteria.registry import table, updated


def main(arguments: list[str]) -> int:
    """Prints or updates; returns the exit code."""
    if not arguments:
        print(table())
        return 0
    for path in map(Path, arguments):
        try:
            path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
        except (OSError, UserError) as error:
            print(f"jaxcrit: error: {path}: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
