"""What principal components say: answers to a whole dataset with sets of them removed, layer by layer, and controls.

    python experiments/pc_removal.py --out=runs/removal                     (embedded model: arithmetic, choice)
    python experiments/pc_removal.py --model=DIR --data=openbookqa:FILE --edition=paper --max_new_tokens=150 --out=DIR

The paper shows one prompt of OpenBookQA on Llama-2-7B-chat: without components {0} of layer 12 the answer loses its
polite frame, without {0, 1, 2} it begins with the conclusion, and a rationale follows that does not end. Here every
prompt is answered, at every layer, and beside {0} and {0, 1, 2} stand other components and random directions of the
same length. Prints a table per measure with 95 % intervals, and writes removal.json and a figure per dataset.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from entry import leave
from removal import RemovalOptions, run_removal
from removal_report import removal_figure, removal_text

from jaxcrit.core import flags, options
from jaxcrit.core.files import write_json
from jaxcrit.core.progress import bars


def main(arguments: Sequence[str]) -> None:
    """Measures, prints, writes."""
    if "--help" in arguments:
        print(options.usage(RemovalOptions, "pc_removal", "what principal components say"))
        return
    (config,) = flags.read([RemovalOptions], "pc_removal", arguments)
    found, computed = run_removal(config, progress=bars)
    print("\n\n".join(removal_text(one) for one in found))
    if config.out:
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        results = [one.to_json() for one in found]
        write_json(
            out / "removal.json",
            "jaxcrit.removal",
            {"config": dataclasses.asdict(config), **computed, "datasets": results},
        )
        for figure in map(removal_figure, found):
            figure.write(out)
        print(f"removal: {out / 'removal.json'}")


if __name__ == "__main__":
    leave(lambda: main(sys.argv[1:]))
