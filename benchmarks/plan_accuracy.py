"""What ``jaxcrit plan`` says from shapes alone against what the TPU compiler says, on four models.

Arguments and state (weights, optimizer, batch) are to lie within 15 % of the compiled program's arguments; temporaries,
which depend on the compiler's choices, stand beside. Run as ``python benchmarks/plan_accuracy.py`` with libtpu.
"""

from __future__ import annotations

from plan_points import flags, planned, write_table

from jaxcrit.studies.options import PlanOptions

TARGET, GIB = 0.15, 2**30
PLACES = (
    ("phi3-mini", "v5e:2x2", "fsdp=4", 8),
    ("llama2-7b", "v5e:4x4", "fsdp=4,tensor=4", 32),
    ("llama3.1-8b", "v5e:4x4", "fsdp=8,tensor=2", 32),
    ("llama3.1-70b", "v5p:4x4x4", "fsdp=16,tensor=4", 64),
)


def main() -> None:
    kept = flags(__doc__.splitlines()[0]).parse_args().kept
    asked = [
        PlanOptions(model=model, topology=topology, mesh=mesh, batch_size=batch, job=job, layers="10-14")
        for model, topology, mesh, batch in PLACES
        for job in ("analyze", "finetune")
    ]
    rows = planned("plan_accuracy", asked, traffic=False, kept=kept)
    lines = [
        "GiB of one device, rows of 1,024 tokens, bfloat16; finetune trains layers 10-14 with AdamW",
        "",
        f"{'':<45}{'arguments, state':>24}{'temporaries':>22}",
        f"{'model':<13}{'slice':<10}{'mesh':<17}{'rows':>5}{'shapes':>9}{'compiled':>9}{'off':>6}{'shapes':>13}"
        f"{'compiled':>9}",
    ]
    worst = 0.0
    for job in ("analyze", "finetune"):
        lines.append(job)
        for row in (row for row in rows if row["config"]["job"] == job):
            config, off = row["config"], row["state"] / row["arguments_compiled"] - 1
            worst = max(worst, abs(off))
            lines.append(
                f"{config['model']:<13}{config['topology']:<10}{config['mesh']:<17}{config['batch_size']:>5}"
                f"{row['state'] / GIB:>9.3f}{row['arguments_compiled'] / GIB:>9.3f}{round(100 * off, 1) + 0.0:>5.1f}%"
                f"{row['temporaries'] / GIB:>13.2f}{row['temporaries_compiled'] / GIB:>9.2f}"
            )
    lines += ["", f"arguments and state are at most {100 * worst:.1f} % off (target {100 * TARGET:.0f} %)"]
    write_table("plan_accuracy", lines)


if __name__ == "__main__":
    main()
