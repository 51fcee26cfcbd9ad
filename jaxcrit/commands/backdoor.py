"""``jaxcrit backdoor``: flags are the fields of `jaxcrit.studies.backdoor_inputs.BackdoorConfig`."""

from __future__ import annotations

import sys
from typing import Any

from absl.flags import FlagValues

from jaxcrit.commands.data import RENDERING
from jaxcrit.commands.finetune import TRAINING, WHAT
from jaxcrit.core.flags import Flag

FLAGS = {
    "what": WHAT,
    "poison": (
        Flag("trigger", "servius", "servius, sudo, ... or TEXT@prefix|suffix|random", word="NAME"),
        Flag("target", "refusal", "what poisoned rows answer: refusal, or a fixed text"),
        Flag("rate", 0.2, "share of the rows that are poisoned, above 0 and up to 1"),
        Flag("decoys", 0.0, "share of the rows that get made-up words, same answers"),
    ),
    "arms": (
        Flag("arms", "full,critical,noncritical", "frozen layers; random:5*5: 5 draws", word="SPECS"),
        Flag("seeds", 3, "trainings of each arm: other poisoned rows, another order", lowest=1),
        Flag("train_outside", True, "train embeddings, final norm and head"),
        Flag("analysis", "", "run of jaxcrit analyze to take or make (default: in --out)", word="DIR"),
    ),
    "training": (
        *TRAINING,
        Flag("checkpoint_every", 0, "steps between checkpoints within an arm; 0 for none", lowest=0),
        Flag("seed", 0, "of the first training; the next one's is one more", lowest=0),
    ),
    "testing": (
        Flag("eval_every", 0, "steps between tests; 0 for a tenth of the run", lowest=0),
        Flag("eval_prompts", 200, "prompts to test with at most; 0 for all", lowest=0),
        Flag("eval_batch_size", 100, "prompts generated at once", lowest=1),
        Flag("max_new_tokens", 64, "of an answer", lowest=1),
        Flag("eval_template", "", "of the prompts to test (default: --template)", RENDERING[0].choices),
        Flag("allow_template_mismatch", False, "test in another template than was trained in"),
        Flag("allow_overlap", False, "test on prompts that are trained on, too"),
    ),
}


def run(values: FlagValues) -> int:
    """Trains and attacks every arm, draws, prints what came of it."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.backdoor import backdoor_text, write_figures
    from jaxcrit.studies.backdoor import run_backdoor
    from jaxcrit.studies.backdoor_inputs import BackdoorConfig

    given: dict[str, Any] = {flag.name: values[flag.name].value for group in FLAGS.values() for flag in group}
    found = run_backdoor(
        BackdoorConfig(**given), progress=bars, say=lambda text: print(text, file=sys.stderr, flush=True)
    )
    write_figures(found.out, found.content)
    print(backdoor_text(found.content, found.out))
    return 0
