"""How an experiment ends as a program: a mistake is a line, and so is being told to leave."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from jaxcrit.commands.main import BAD_USAGE, PREEMPTED
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_json, write_json
from jaxcrit.core.pages import keep_pages
from jaxcrit.parallel.preemption import INTERRUPTED, Preempted


def leave(main: Callable[[], int | None]) -> NoReturn:
    """Runs a program and exits as ``jaxcrit`` does: 2 after a mistake, 75 when told to leave, 130 by Ctrl-C.

    Most train, so memory is kept as ``jaxcrit finetune`` keeps it.
    """
    keep_pages()
    try:
        sys.exit(main())
    except UserError as error:
        print(f"{Path(sys.argv[0]).stem}: error: {error}", file=sys.stderr)
        sys.exit(BAD_USAGE)
    except Preempted as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(INTERRUPTED if error.by_hand else PREEMPTED)


def told(
    given: argparse.Namespace,
    kind: str,
    measure: Callable[[argparse.Namespace], Mapping[str, Any]],
    report: Callable[[Mapping[str, Any]], str],
) -> int:
    """Prints the report of what ``--read`` names, or of what is measured now, which is kept in OUT; the exit code.

    Args:
        given: flags, ``read`` and ``out`` among them.
        kind: format of the results, such as ``jaxcrit.handover``, which are kept as ``handover.json``.
        measure: makes them; OUT is there afterwards.
        report: says them.
    """
    try:
        if given.read:
            content: Mapping[str, Any] = read_json(Path(given.read), kind)
        else:
            content = measure(given)
            write_json(Path(given.out) / f"{kind.removeprefix('jaxcrit.')}.json", kind, content)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_USAGE
    print(report(content))
    return 0
