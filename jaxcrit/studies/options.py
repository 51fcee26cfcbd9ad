"""Options of commands whose work is a study of its own."""

from __future__ import annotations

import dataclasses

from jaxcrit.core.groups import (
    DTYPES,
    OPTIMIZERS,
    RESUMES,
    LayerTrainingOptions,
    ObjectiveOptions,
    TrainingOptions,
)
from jaxcrit.core.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(LayerTrainingOptions, ObjectiveOptions, title="what"):
    """What ``jaxcrit plan`` is asked; layers go by number or rule, not by score."""

    model: str = option("", "directory with a config.json, or a model's name: llama2-7b", word="DIR")
    job: str = option("finetune", "finetune, analyze, screen, generate, reuse, edit, ...", word="JOB")
    topology: str = option("v5e:4x4", "chips, such as v5e:2x4, v5p-16, h100:8, 4090, gpu:2", word="NAME")
    memory: str = option("", "memory of a device, such as 24GiB (default: the chip's)", word="SIZE")
    mesh: str = option("", "devices by axis (default: weights over all of them)", word="AXES")
    batch_size: int = option(32, "rows, over all devices", lowest=1)
    length: int = option(1024, "tokens of a row; of generate, reuse: of its prompt", lowest=1)
    window: int = option(5, "of substitute: layers taken together", lowest=1)
    max_new_tokens: int = option(64, "of generate, reuse: tokens of each answer", lowest=1)
    dtype: str = option("bfloat16", "dtype of compute; trained weights are float32", DTYPES)
    layers: str = option("all", "layers by number, all, first:K, last:K, random:K", word="SPEC")
    optimizer: str = option("adamw", "optimizer; lion and adafactor need less memory", OPTIMIZERS, group="layers")
    remat: bool = option(True, "recompute blocks in the backward pass: less memory", group="layers")
    drift_every: int = option(0, "of finetune: above 0 counts the copy of what trains", lowest=0, group="layers")
    search: bool = option(False, "try meshes and batch sizes, and plan the best that fits", group="how")
    compile: bool = option(True, "compile where libtpu is installed, else shapes alone", group="how")


KEPT = "says what is kept; arms without are trained again"
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
    eval_template: str = option("", "template of tests (default: --template)", word="NAME")
    allow_template_mismatch: bool = option(False, "test in another template than was trained in")
    allow_overlap: bool = option(False, "test on prompts that are trained on, too")
    keep_models: bool = option(False, "keep trained weights, a checkpoint an arm and seed", free=KEPT)

    @property
    def response(self) -> str:
        """What poisoned rows answer."""
        from jaxcrit.data.poisoning import REFUSAL

        return REFUSAL if self.target == "refusal" else self.target
