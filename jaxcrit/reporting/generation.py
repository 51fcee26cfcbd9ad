"""What ``jaxcrit generate`` prints."""

from __future__ import annotations

from jaxcrit.reporting.tables import shortened
from jaxcrit.studies.generation import GENERATIONS, Generations

_SHOWN = 3


def generations_text(found: Generations) -> str:
    """The first answers of every dataset, one line each, how many came to an end, and where all are."""
    lines = []
    for name, rows in found.rows.items():
        lines += [shortened(f"{name} {row['row'] + 1}: {row['text']!r}") for row in rows[:_SHOWN]]
        stopped, tokens = sum(row["stopped"] for row in rows), sum(len(row["token_ids"]) for row in rows)
        lines.append(
            f"{name}: {len(rows)} answers of {tokens / max(len(rows), 1):.1f} tokens on average, {stopped} came to an"
            f" end by themselves, {len(rows) - stopped} at --max_new_tokens"
        )
    alone = len(found.rows) == 1
    if found.out is not None:
        lines.append(f"generations: {found.out / GENERATIONS if alone else found.out / '*' / GENERATIONS}")
    return "\n".join(lines)
