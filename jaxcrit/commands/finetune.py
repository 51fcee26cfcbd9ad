"""``jaxcrit finetune``: flags are the fields of `jaxcrit.studies.finetune.FinetuneConfig`."""

from __future__ import annotations

import sys
from typing import Any

from absl.flags import FlagValues

from jaxcrit.commands.data import RENDERING, ROWS
from jaxcrit.core.flags import Flag

# Every command that trains has these.
WHAT = (
    Flag("model", "", "checkpoint directory, hub id or finetune run (default: embedded)", word="DIR"),
    *ROWS,
    Flag("eval_data", "", "rows to test on (default: a tenth of the rows, held out)", word="FILE"),
    Flag("eval_split", "", "of alpaca, dolly, ... to test on (default: test)", ("train", "val", "test", "all")),
    Flag("out", "", "run directory; a run in it goes on (default: a new one here)", word="DIR"),
    *RENDERING,
    Flag("max_length", 0, "tokens per row; 0 for the model's context", lowest=0),
)
TRAINING = (
    Flag("steps", 0, "optimizer steps; 0 goes by epochs", lowest=0),
    Flag("epochs", 0, "passes over the rows; 0 for one", lowest=0),
    Flag("batch_size", 8, "rows per forward and backward pass", lowest=1),
    Flag("accumulate", 1, "such passes per step", lowest=1),
    Flag("optimizer", "adamw", "lion and adafactor need less memory", ("adamw", "lion", "adafactor", "sgd")),
    Flag("learning_rate", 2e-5, "highest"),
    Flag("schedule", "constant", "after the warm-up", ("constant", "linear", "cosine")),
    Flag("warmup", 0, "steps of linear rise", lowest=0),
    Flag("weight_decay", 0.0, "of matrices", lowest=0),
    Flag("clip", 0.0, "largest gradient norm; 0 for any", lowest=0),
    Flag("dtype", "", "of compute; trained weights are float32", ("float32", "bfloat16")),
    Flag("remat", True, "recompute blocks in the backward pass: less memory"),
    Flag("mesh", "", "devices by axis, such as data=4,fsdp=2 (default: by model size)", word="AXES"),
)

FLAGS = {
    "what": WHAT,
    "layers": (
        Flag("layers", "critical", "critical:K, noncritical:K, first:K, 3-5,9, ...", word="SPEC"),
        Flag("mode", "only", "train only these layers, or freeze these", ("only", "freeze")),
        Flag("train_embeddings", None, "(default: with freeze, without adapters)"),
        Flag("train_norms", None, "the final norm (default: as above)"),
        Flag("train_head", None, "(default: as above)"),
        Flag("layer_rates", "", "factors on the learning rate: 0-7:0.5,8-15:2", word="RATES"),
        Flag("lora_rank", 0, "train adapters of this rank instead; 0 for none", lowest=0),
        Flag("lora_alpha", 0.0, "they count alpha/rank times; 0 for twice the rank", lowest=0),
        Flag("lora_targets", "", "of q,k,v,o,gate,up,down (default: all)", word="NAMES"),
        Flag("analysis", "", "run of jaxcrit analyze to take or make (default: in --out)", word="DIR"),
    ),
    "training": (*TRAINING, Flag("seed", 0, "of the order of rows", lowest=0)),
    "while it runs": (
        Flag("eval_every", 0, "steps between tests; 0 for a twentieth of the run", lowest=0),
        Flag("checkpoint_every", 0, "steps between checkpoints; 0 for a tenth", lowest=0),
        Flag("keep", 2, "newest checkpoints kept, besides the best", lowest=1),
        Flag("patience", 0, "tests without improvement before it stops; 0 for never", lowest=0),
        Flag("tensorboard", False, "event files too (needs tensorboardX)"),
    ),
}


def run(values: FlagValues) -> int:
    """Trains, draws the test loss, prints what came of it."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.training import finetune_text, write_curve
    from jaxcrit.studies.finetune import FinetuneConfig, run_finetune

    given: dict[str, Any] = {flag.name: values[flag.name].value for group in FLAGS.values() for flag in group}
    finetuned = run_finetune(
        FinetuneConfig(**given), progress=bars, say=lambda text: print(text, file=sys.stderr, flush=True)
    )
    write_curve(finetuned.out, {"test loss": finetuned.metrics})
    print(finetune_text(finetuned.run, finetuned.metrics, finetuned.warnings, finetuned.out))
    return 0
