"""What `jaxcrit data` shows: rendered rows with their mask, lengths, the hash of the rendering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxcrit.data.inspection import Lengths, Shown
from jaxcrit.reporting.tables import aligned

MASKED, LOSS = "· ", "+ "


def example_text(shown: Shown) -> str:
    """One rendered row, a mark before every line: ``·`` without loss, ``+`` with loss."""
    loss = shown.num_tokens - shown.prompt_length
    lines = [f"{shown.dataset}, row {shown.row}: {shown.prompt_length} tokens masked (·), {loss} with loss (+)"]
    for mark, text in ((MASKED, shown.prompt), (LOSS, shown.target)):
        lines += [mark + line for line in text.split("\n")] if text else []
    return "\n".join(lines)


def length_table(lengths: Mapping[str, Lengths], limit: Mapping[str, int]) -> str:
    """One row per dataset: tokens of prompts and responses (least, median, most), and what does not fit."""
    header = ["rows", "prompt", "response", "limit", "too long", "truncated", "no response", "dataset"]
    rows = [
        [
            str(one.num_rows),
            " ".join(map(str, one.prompt)),
            " ".join(map(str, one.response)),
            str(limit[name]),
            f"{one.too_long:.1%}",
            f"{one.truncated:.1%}",
            f"{one.without_response:.1%}",
            name,
        ]
        for name, one in lengths.items()
    ]
    return "\n".join(aligned(header, rows, [False] * len(rows)))


def data_text(
    shown: Sequence[Shown], lengths: Mapping[str, Lengths], limit: Mapping[str, int], template_hash: str
) -> str:
    """The whole answer of the command."""
    title = "tokens per row (least, median, most):"
    return "\n\n".join(
        [*map(example_text, shown), f"{title}\n{length_table(lengths, limit)}", f"template hash: {template_hash}"]
    )
