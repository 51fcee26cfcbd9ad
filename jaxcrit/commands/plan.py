"""``jaxcrit plan``: flags are the fields of `jaxcrit.studies.plan.PlanConfig`."""

from __future__ import annotations

from typing import Any

from absl.flags import FlagValues

from jaxcrit.core.errors import UserError
from jaxcrit.core.flags import Flag

DOES_NOT_FIT = 3
FLAGS = {
    "what": (
        Flag("model", "", "directory with a config.json, or a shape such as llama2-7b", word="DIR"),
        Flag("job", "finetune", "analyze, finetune, substitute or generate", word="JOB"),
        Flag("topology", "v5e:4x4", "chips, such as v5e:2x4, v5p:2x2x2, h100:8", word="NAME"),
        Flag("mesh", "", "devices by axis (default: weights over all of them)", word="AXES"),
        Flag("batch_size", 32, "rows, over all devices", lowest=1),
        Flag("length", 1024, "tokens of a row; of generate, of its prompt", lowest=1),
        Flag("window", 5, "of substitute: layers taken together", lowest=1),
        Flag("max_new_tokens", 64, "of generate", lowest=1),
        Flag("dtype", "bfloat16", "of compute; trained weights are float32", ("float32", "bfloat16")),
    ),
    "training": (
        Flag("layers", "all", "layers by number, all, first:K, last:K, random:K", word="SPEC"),
        Flag("mode", "only", "train only these layers, or freeze these", ("only", "freeze")),
        Flag("train_embeddings", None, "(default: with freeze, without adapters)"),
        Flag("train_norms", None, "the final norm (default: as above)"),
        Flag("train_head", None, "(default: as above)"),
        Flag("lora_rank", 0, "train adapters of this rank instead; 0 for none", lowest=0),
        Flag("lora_targets", "", "of q,k,v,o,gate,up,down (default: all)", word="NAMES"),
        Flag("optimizer", "adamw", "lion and adafactor need less memory", ("adamw", "lion", "adafactor", "sgd")),
        Flag("remat", True, "recompute blocks in the backward pass: less memory"),
    ),
    "how": (
        Flag("search", False, "try meshes and batch sizes, and plan the best that fits"),
        Flag("compile", True, "compile where libtpu is installed, else shapes alone"),
    ),
}


def run(values: FlagValues) -> int:
    """Plans and prints; 3 where it does not fit."""
    if not values.model:
        raise UserError("plan: expected --model=DIR, with the config.json of the model, or --model=SHAPE")
    from jaxcrit.reporting.plan import plan_text
    from jaxcrit.studies.plan import PlanConfig, fitting, run_plan

    given: dict[str, Any] = {flag.name: values[flag.name].value for group in FLAGS.values() for flag in group}
    config = PlanConfig(**given, attention=values.attention)
    plan = run_plan(config)
    print(plan_text(plan))
    if plan.fits:
        return 0
    other = fitting(plan)
    if other is None:
        print("nothing on this topology would fit; take more chips, or train fewer layers")
    else:
        print(f"would fit, by shapes: --mesh={other.mesh} --batch_size={other.batch_size}")
    return DOES_NOT_FIT
