"""How an experiment ends as a program: a mistake is a line, and so is being told to leave."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from jaxcrit.commands.main import BAD_USAGE, PREEMPTED
from jaxcrit.core.errors import UserError
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
