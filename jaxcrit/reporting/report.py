"""The report page: one HTML file with its pictures inside, readable offline, in light and dark."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2

# Of run.json: stands higher on the page already, or repeats other entries to identify the run.
SHOWN_ELSEWHERE = ("chosen", "warnings", "determines", "result")
CAVEATS = (
    "A layer here is a 0-based decoder block; its state is what leaves the block, before the final norm.",
    "Biased CKA is high for any two layers when there are fewer samples than dimensions: compare it with the null, or"
    " read the debiased values, which are near 0 for unrelated layers.",
    "Standard errors and P(chosen) say how much the result would change with other prompts of the same kind, not with"
    " another kind of prompt, another template or another model.",
    "A low δ says that the representation changes at a layer. That training these layers pays more is the paper's"
    " observation on its models and data; a run on your own data is the test.",
)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture of the page.

    Attributes:
        name: file name of the same picture beside the page.
        png: its bytes.
        caption: one sentence, also read out in place of the picture.
    """

    name: str
    png: bytes
    caption: str

    @property
    def source(self) -> str:
        """The picture as a ``data:`` URL."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode('ascii')}"


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: heading.
        note: sentence under it, or empty.
        table: text table.
        figures: under the table.
    """

    title: str
    note: str
    table: str
    figures: Sequence[Figure]


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Rows of names and values of nested JSON."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            yield f"{prefix}{key}", text if text else "(default)"


def render_report(
    headlines: Sequence[str],
    warnings: Sequence[str],
    sections: Sequence[Section],
    configs: Mapping[str, str],
    run: Mapping[str, Any],
    *,
    caveats: Sequence[str] = CAVEATS,
) -> str:
    """Renders the page; all text is escaped.

    Args:
        headlines: the answer, then how sure it is.
        warnings: one line each.
        sections: tables and figures.
        configs: text for other trainers, by file name; their section is left out where there are none.
        run: what ``run.json`` holds.
        caveats: how to read it, one sentence each.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxcrit.reporting", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        headlines=headlines,
        warnings=warnings,
        command=run["command"],
        sections=sections,
        configs=configs,
        caveats=caveats,
        provenance=list(_flat({key: value for key, value in run.items() if key not in SHOWN_ELSEWHERE})),
    )
