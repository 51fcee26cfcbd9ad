"""``jaxcrit plan``: what a job needs on a TPU slice or GPUs, compiled without having one."""

from __future__ import annotations

import dataclasses

from jaxcrit.commands.finetune import LayerTrainingOptions
from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import DTYPES, OPTIMIZERS
from jaxcrit.core.options import option

DOES_NOT_FIT = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(LayerTrainingOptions, title="what"):
    """What ``jaxcrit plan`` is asked; layers go by number or rule, not by score."""

    model: str = option("", "directory with a config.json, or a shape such as llama2-7b", word="DIR")
    job: str = option("finetune", "analyze, finetune, substitute or generate", word="JOB")
    topology: str = option("v5e:4x4", "chips, such as v5e:2x4, v5p:2x2x2, h100:8", word="NAME")
    mesh: str = option("", "devices by axis (default: weights over all of them)", word="AXES")
    batch_size: int = option(32, "rows, over all devices", lowest=1)
    length: int = option(1024, "tokens of a row; of generate, of its prompt", lowest=1)
    window: int = option(5, "of substitute: layers taken together", lowest=1)
    max_new_tokens: int = option(64, "of generate: tokens of each answer", lowest=1)
    dtype: str = option("bfloat16", "dtype of compute; trained weights are float32", DTYPES)
    layers: str = option("all", "layers by number, all, first:K, last:K, random:K", word="SPEC")
    optimizer: str = option("adamw", "optimizer; lion and adafactor need less memory", OPTIMIZERS, group="layers")
    remat: bool = option(True, "recompute blocks in the backward pass: less memory", group="layers")
    search: bool = option(False, "try meshes and batch sizes, and plan the best that fits", group="how")
    compile: bool = option(True, "compile where libtpu is installed, else shapes alone", group="how")


OPTIONS = PlanOptions


def run(options: PlanOptions) -> int:
    """Plans and prints; 3 where it does not fit."""
    if not options.model:
        raise UserError("plan: expected --model=DIR, with the config.json of the model, or --model=SHAPE")
    from jaxcrit.reporting.plan import plan_text
    from jaxcrit.studies.plan import fitting, run_plan

    plan = run_plan(options)
    print(plan_text(plan))
    if plan.fits:
        return 0
    other = fitting(plan)
    if other is None:
        print("nothing on this topology would fit; take more chips, or train fewer layers")
    else:
        print(f"would fit, by shapes: --mesh={other.mesh} --batch_size={other.batch_size}")
    return DOES_NOT_FIT
