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
from typing import Any

from jaxcrit.commands.data import RENDERING, ROWS
from jaxcrit.core import flags
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import write_bytes, write_json
from jaxcrit.core.flags import Flag
from jaxcrit.core.progress import bars
from jaxcrit.reporting.removal import removal_figure, removal_text
from jaxcrit.studies.removal import RemovalConfig, run_removal

_DEFAULTS = RemovalConfig()
FLAGS = {
    "what": (
        Flag("model", "", "checkpoint directory, hub id or finetune run (default: embedded)", word="DIR"),
        *(dataclasses.replace(flag, default=getattr(_DEFAULTS, flag.name)) for flag in ROWS),
        Flag("out", "", "directory for removal.json and figures (default: none)", word="DIR"),
        *RENDERING,
    ),
    "removal": (
        Flag("layers", "all", "edited one at a time", word="SPEC"),
        Flag("critical", "critical", "which count as critical", word="SPEC"),
        Flag("sets", _DEFAULTS.sets, "components, apart by ;", word="SETS"),
        Flag("mode", "paper", "the prompt's part, or the state's own", ("paper", "project")),
        Flag("prompt_index", _DEFAULTS.prompt_index, "of the example", lowest=0),
        Flag("seed", 0, "of random directions and bootstrap", lowest=0),
    ),
    "generation": (
        Flag("max_new_tokens", _DEFAULTS.max_new_tokens, "of each answer, at most", lowest=1),
        Flag("stop", "", "more tokens that end an answer", word="TOKENS"),
        Flag("batch_size", _DEFAULTS.batch_size, "prompts at a time", lowest=1),
        Flag("dtype", "", "of weights and compute", ("float32", "bfloat16")),
        Flag("mesh", "", "devices by axis", word="AXES"),
    ),
}


def main(arguments: Sequence[str]) -> None:
    """Measures, prints, writes."""
    if "--help" in arguments:
        print(flags.usage(FLAGS, "pc_removal", "what principal components say"))
        return
    values = flags.parse(FLAGS, "pc_removal", arguments)
    given: dict[str, Any] = {flag.name: values[flag.name].value for group in FLAGS.values() for flag in group}
    folder = given.pop("out")
    config = RemovalConfig(**given)
    found, computed = run_removal(config, progress=bars)
    print("\n\n".join(removal_text(one) for one in found))
    if folder:
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        results = [one.to_json() for one in found]
        write_json(out / "removal.json", "jaxcrit.removal", {"config": dataclasses.asdict(config), **computed,
                                                             "datasets": results})  # fmt: skip
        for one in found:
            write_bytes(out / f"removal-{one.dataset.rpartition(':')[2].rpartition('/')[2]}.png", removal_figure(one))
        print(f"removal: {out / 'removal.json'}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"pc_removal: error: {error}")
