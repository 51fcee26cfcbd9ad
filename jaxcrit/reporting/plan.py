"""A plan as a table for the terminal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from jaxcrit.models.shapes import SHAPES, shape_of
from jaxcrit.parallel.chips import USABLE

GIB = 2**30


def plan_text(plan: Any) -> str:
    """Memory by kind, traffic, time at the ceilings, whether it fits: of a `jaxcrit.studies.plan.Plan`."""
    config, chip, compiled = plan.config, plan.topology.chip, plan.compiled
    mesh = ",".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    of = {
        "finetune": f" of layers {config.layers} ({config.mode}"
        f"{f', adapters of rank {config.lora_rank}' if config.lora_rank else ''})",
        "substitute": f" in windows of {config.window}",
        "generate": f" of {config.max_new_tokens} tokens",
        "reuse": f" of prefixes of 0.8, {config.max_new_tokens} new tokens",
    }.get(config.job, "")
    done, unit = config.batch_size * config.length, "tokens"
    if config.job == "generate":
        done, unit = config.batch_size * config.max_new_tokens, "new tokens"
    lines = [
        f"{config.model}: {config.job}{of}, {config.batch_size} x {config.length:,} tokens, {config.dtype},"
        f" on {config.topology} ({mesh})",
        "",
        f"{'a device':<26}{'GiB':>9}",
        *(f"  {kind:<24}{size / GIB:>9.2f}" for kind, size in plan.memory.items()),
        f"  {'temporaries, estimated':<24}{plan.temporaries / GIB:>9.2f}",
    ]
    if compiled and not compiled.needed:
        lines += [
            f"  {'arguments, compiled':<24}{compiled.arguments / GIB:>9.2f}",
            f"  {'temporaries, compiled':<24}{compiled.temporaries / GIB:>9.2f}",
        ]
    lines.append(f"  {'peak':<24}{plan.peak / GIB:>9.2f}  of {USABLE * chip.memory / GIB:.2f} usable: {_verdict(plan)}")
    seconds = plan.seconds
    if math.isinf(chip.flops):
        return "\n".join([*lines, *_ends(plan)])
    lines += [
        "",
        f"{'a device, a batch':<26}{'amount':>12}{'at best':>12}",
        f"  {'matrix products':<24}{plan.flops / 1e12:>6.2f} TFLOP{seconds['compute']:>10.3f} s",
        f"  {'memory, at least':<24}{plan.moved / GIB:>8.2f} GiB{seconds['memory']:>10.3f} s",
        f"  {'links':<24}{plan.exchanged / GIB:>8.2f} GiB{seconds['links']:>10.3f} s",
    ]
    if compiled and compiled.collectives:
        for kind, (runs, size) in sorted(compiled.collectives.items(), key=lambda item: -item[1][1]):
            lines.append(f"    {kind:<22}{size / GIB:>8.2f} GiB  in {runs:,}")
    bound = max(seconds, key=seconds.get)
    lines += [
        "",
        f"no faster than {seconds[bound]:.3f} s a batch, bound by {bound} ({done / seconds[bound]:,.0f} {unit}/s)",
        f"ceilings of a {chip.name}: {chip.flops / 1e12:,.0f} bf16 TFLOP/s, {chip.bandwidth / 1e9:,.0f} GB/s of memory,"
        f" {chip.links / 1e9:,.0f} GB/s of links",
        f"  ({chip.source})",
    ]
    return "\n".join([*lines, *_ends(plan)])


def _ends(plan: Any) -> list[str]:
    """How attention goes, what trains, notes."""
    form, why = plan.attention
    lines = []
    lines.append(f"attention: {form}" + (f" ({why})" if why else ""))
    if plan.trained:
        lines.append(f"{plan.trained:,} parameters train")
    if plan.compiled:
        lines.append(f"compiled ahead of time in {plan.compiled.seconds:.1f} s")
    model, notes = plan.config.model, list(plan.notes)
    if model not in SHAPES and not Path(model).expanduser().exists() and (shape := shape_of(model)):
        notes.append(f"{model} is not here: planned by the shape of {shape}")
    return [*lines, *(f"note: {note}" for note in notes)]


def _verdict(plan: Any) -> str:
    if plan.fits:
        return "fits"
    over = max(plan.peak - USABLE * plan.topology.chip.memory, 0) / GIB
    return f"does not fit, by {over:.2f} GiB"
