"""Work and traffic of one chip as the same batch is spread over 1 to 256 of them, from ahead-of-time compiles.

The weights are split over all chips (``fsdp``), so every chip must be sent all of them in each pass, however many chips
there are, while its share of the work shrinks: from some number on it waits for the links. Run as
``python benchmarks/plan_scaling.py`` with libtpu; one compile per point, points that are there already are kept.
"""

from __future__ import annotations

import math
from typing import Any

from plan_points import flags, planned, write_table

from jaxcrit.studies.options import PlanOptions

GIB = 2**30
SLICES = {1: "v5e:1x1", 4: "v5e:2x2", 16: "v5e:4x4", 64: "v5e:8x8", 256: "v5e:16x16"}
ROWS, LENGTH = 256, 128
JOBS = {"analyze": "all", "finetune": "last:5"}


def main() -> None:
    parser = flags(__doc__.splitlines()[0])
    parser.add_argument("--model", default="tinyllama-1.1b", help="a shape that jaxcrit plan knows")
    given = parser.parse_args()
    model = given.model
    asked = [
        PlanOptions(
            model=model, topology=topology, mesh=f"fsdp={chips}", job=job, layers=layers, batch_size=ROWS, length=LENGTH
        )
        for job, layers in JOBS.items()
        for chips, topology in SLICES.items()
    ]
    rows = planned("plan_scaling", asked, traffic=True, kept=given.kept)
    lines = [
        f"{model}, {ROWS} rows of {LENGTH} tokens over all chips of a v5e slice, weights split over all of them;",
        "one chip, one batch; memory: weights and state read and written, at least; links: what collectives give",
    ]
    for job, layers in JOBS.items():
        mine = [row for row in rows if row["config"]["job"] == job]
        lines += [
            "",
            job if job == "analyze" else f"{job}, layers {layers}, AdamW",
            f"{'chips':>6}{'TFLOP':>9}{'memory GiB':>12}{'links GiB':>11}{'compute ms':>12}{'memory ms':>11}"
            f"{'links ms':>10}{'peak GiB':>10}",
        ]
        for row in mine:
            seconds = row["seconds"]
            lines.append(
                f"{row['devices']:>6}{row['flops'] / 1e12:>9.3f}{row['moved'] / GIB:>12.2f}"
                f"{row['exchanged'] / GIB:>11.2f}{1e3 * seconds['compute']:>12.2f}{1e3 * seconds['memory']:>11.2f}"
                f"{1e3 * seconds['links']:>10.2f}{row['peak'] / GIB:>10.2f}{'' if row['fits'] else '  does not fit'}"
            )
        lines.append(_overtakes(mine))
    write_table("plan_scaling", lines)


def _overtakes(rows: list[dict[str, Any]]) -> str:
    """Where the links need longer than the products, between two points in a straight line of logarithms."""
    before, under = 1, 0.0
    for row in rows:
        chips, seconds = row["devices"], row["seconds"]
        gap = math.log(seconds["links"] / seconds["compute"]) if seconds["links"] else 0.0
        if gap > 0 and not under:
            return f"links overtake compute between {before} and {chips} chips"
        if gap > 0:
            crossing = before * (chips / before) ** (-under / (gap - under))
            tokens = ROWS * LENGTH / crossing
            return f"links overtake compute at about {crossing:.0f} chips, {tokens:,.0f} tokens a chip"
        before, under = chips, gap
    return "compute needs longer everywhere"


if __name__ == "__main__":
    main()
