"""``jaxcrit plan``: what a job needs on a TPU slice or GPUs, compiled without having one."""

from __future__ import annotations

import dataclasses

from jaxcrit.commands import shared
from jaxcrit.core import console
from jaxcrit.core.errors import UserError
from jaxcrit.studies.options import PlanOptions

DOES_NOT_FIT = 3


OPTIONS = PlanOptions


def run(options: PlanOptions) -> int:
    """Plans and prints; 3 where it does not fit."""
    if not options.model:
        raise UserError("plan: expected --model=DIR, with the config.json of the model, or --model=SHAPE")
    from jaxcrit.reporting.plan import plan_text
    from jaxcrit.studies.plan import advice, fitting, missing, run_plan

    plan = run_plan(options)
    console.tell(plan_text(plan))
    if plan.fits:
        # Named even if it is the one that no --mesh asks for: a job's own default is another.
        mesh = options.mesh or ",".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1)
        shared.tell_next("plan", dataclasses.replace(plan.config, mesh=mesh), None)
        return 0
    other = fitting(plan)
    if other is None:
        console.tell(f"{missing(plan)}; {advice(plan.config)}")
    else:
        console.tell(f"would fit, by shapes: --mesh={other.mesh} --batch_size={other.batch_size}")
    return DOES_NOT_FIT
