"""``jaxcrit finetune``: trains exactly the layers that are chosen."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys

from jaxcrit.core.errors import UserError
from jaxcrit.core.files import in_bucket
from jaxcrit.core.groups import RESUMES, WHERE, TrainingOptions
from jaxcrit.core.options import Options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerTrainingOptions(Options, title="layers"):
    """Which layers train, and how much of each."""

    layers: str = option("critical", "critical:K, noncritical:K, first:K, 3-5,9, ...", word="SPEC")
    mode: str = option("only", "train only these layers, or freeze these", ("only", "freeze"))
    train_embeddings: bool | None = option(None, "train embeddings (default: with freeze, without adapters)")
    train_norms: bool | None = option(None, "train the final norm (default: as above)")
    train_head: bool | None = option(None, "train the head (default: as above)")
    lora_rank: int = option(0, "train adapters of this rank instead; 0 for none", lowest=0)
    lora_targets: str = option("", "adapters on some of q,k,v,o,gate,up,down (default: all)", word="NAMES")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TrainingOptions, LayerTrainingOptions, title="layers"):
    """What ``jaxcrit finetune`` is asked."""

    layer_rates: str = option("", "factors on the learning rate: 0-7:0.5,8-15:2", word="RATES")
    lora_alpha: float = option(0.0, "adapters count alpha/rank times; 0 for twice the rank", lowest=0)
    keep: int = option(2, "newest checkpoints kept, besides the best", lowest=1, free=RESUMES, group="while it runs")
    patience: int = option(0, "tests without improvement before it stops; 0 for never", lowest=0, group="while it runs")
    tensorboard: bool = option(False, "event files too (needs tensorboardX)", free=WHERE, group="while it runs")

    def check(self) -> None:
        """Refuses options of adapters where there are none, and event files in a bucket."""
        super().check()
        for name in ("lora_alpha", "lora_targets"):
            if getattr(self, name) and not self.lora_rank:
                raise UserError(f"--{name}={getattr(self, name)}: is of adapters; give their --lora_rank too")
        if self.tensorboard and in_bucket(self.out):
            raise UserError(f"--tensorboard: writes local files only, and --out={self.out} is none; read metrics.jsonl")
        if self.tensorboard and importlib.util.find_spec("tensorboardX") is None:
            raise UserError(
                "--tensorboard: needs tensorboardX; pip install 'jaxcrit[tensorboard]', or read metrics.jsonl"
            )


OPTIONS = FinetuneOptions


def run(options: FinetuneOptions) -> int:
    """Trains, draws the test loss, prints what came of it."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.training import finetune_text, write_curve
    from jaxcrit.studies.finetune import Finetuned, run_finetune

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def finish(found: Finetuned) -> None:
        write_curve(found.out, {"test loss": found.metrics})

    found = run_finetune(options, progress=bars, say=say, finish=finish)
    print(finetune_text(found.run, found.times, found.metrics, found.warnings, found.out))
    return 0
