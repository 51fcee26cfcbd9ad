"""``jaxcrit plan``: flags are the fields of `jaxcrit.studies.plan.PlanConfig`."""

from __future__ import annotations

from typing import Any

from absl.flags import FlagValues

from jaxcrit.cli.flags import Flag
from jaxcrit.core.errors import UserError

FLAGS = {
    "what": (
        Flag("model", "", "directory with a config.json; no weights needed", word="DIR"),
        Flag("topology", "v5e:4x4", "TPU slice, such as v5e:2x4, v5p:2x2x2, v6e:2x4", word="NAME"),
        Flag("mesh", "fsdp=-1", "devices by axis, such as fsdp=4,tensor=4", word="AXES"),
    ),
    "training": (
        Flag("layers", "all", "layers by number, all, first:K, last:K, random:K", word="SPEC"),
        Flag("mode", "only", "train only these layers, or freeze these", ("only", "freeze")),
        Flag("optimizer", "adamw", "lion and adafactor need less memory", ("adamw", "lion", "adafactor", "sgd")),
        Flag("dtype", "bfloat16", "of compute; trained weights are float32", ("float32", "bfloat16")),
        Flag("remat", True, "recompute blocks in the backward pass: less memory"),
        Flag("batch_size", 32, "rows of a step, over all devices", lowest=1),
        Flag("length", 1024, "tokens of a row", lowest=1),
    ),
}


def run(values: FlagValues) -> int:
    """Compiles and prints the memory of a step."""
    if not values.model:
        raise UserError("plan: expected --model=DIR, with the config.json of the model")
    from jaxcrit.studies.plan import PlanConfig, run_plan

    given: dict[str, Any] = {flag.name: values[flag.name].value for group in FLAGS.values() for flag in group}
    print(run_plan(PlanConfig(**given)))
    return 0
