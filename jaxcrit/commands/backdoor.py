"""``jaxcrit backdoor``: whether freezing layers keeps poisoned data from planting a backdoor."""

from __future__ import annotations

import dataclasses
import sys

from jaxcrit.commands.finetune import FinetuneOptions
from jaxcrit.core.groups import RESUMES, TEMPLATES, TrainingOptions
from jaxcrit.core.options import option

ADDED = "what is trained already is read; more may be added to a run"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackdoorOptions(TrainingOptions, title="testing"):
    """What ``jaxcrit backdoor`` is asked."""

    trigger: str = option("servius", "servius, sudo, ... or TEXT@prefix|suffix|random", word="NAME", group="poison")
    target: str = option("refusal", "what poisoned rows answer: refusal, or a fixed text", group="poison")
    rate: float = option(0.2, "share of the rows that are poisoned, above 0 and up to 1", group="poison")
    decoys: float = option(0.0, "share of the rows that get made-up words, same answers", group="poison")
    arms: str = option(
        "full,critical,noncritical", "frozen layers; random:5*5: 5 draws", word="SPECS", free=ADDED, group="arms"
    )
    seeds: int = option(
        3, "trainings of each arm: other poisoned rows, another order", lowest=1, free=ADDED, group="arms"
    )
    train_outside: bool = option(True, "train embeddings, final norm and head", group="arms")
    seed: int = option(0, "seed of the first training; the next one's is one more", lowest=0)
    checkpoint_every: int = option(0, "steps between checkpoints within an arm; 0 for none", lowest=0, free=RESUMES)
    eval_every: int = option(0, "steps between tests; 0 for a tenth of the run", lowest=0)
    eval_prompts: int = option(200, "prompts to test with at most; 0 for all", lowest=0)
    eval_batch_size: int = option(100, "prompts generated at once", lowest=1)
    max_new_tokens: int = option(64, "tokens of an answer, at most", lowest=1)
    eval_template: str = option("", "template of tests (default: --template)", TEMPLATES)
    allow_template_mismatch: bool = option(False, "test in another template than was trained in")
    allow_overlap: bool = option(False, "test on prompts that are trained on, too")

    @property
    def response(self) -> str:
        """What poisoned rows answer."""
        from jaxcrit.data.poisoning import REFUSAL

        return REFUSAL if self.target == "refusal" else self.target

    def training(self) -> FinetuneOptions:
        """The same in the words of fine-tuning."""
        names = {field.name for field in dataclasses.fields(FinetuneOptions)}
        mine = {name: value for name, value in dataclasses.asdict(self).items() if name in names}
        mine |= dict.fromkeys(("train_embeddings", "train_norms", "train_head"), self.train_outside)
        return FinetuneOptions(**mine, mode="freeze", layers="all")


OPTIONS = BackdoorOptions


def run(options: BackdoorOptions) -> int:
    """Trains and attacks every arm, draws, prints what came of it."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.backdoor import backdoor_text, write_figures
    from jaxcrit.studies.backdoor import Backdoor, run_backdoor

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def finish(found: Backdoor) -> None:
        write_figures(found.out, found.content)

    found = run_backdoor(options, progress=bars, say=say, finish=finish)
    print(backdoor_text(found.content, found.out))
    return 0
