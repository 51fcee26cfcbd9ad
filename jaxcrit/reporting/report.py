"""A report is a value: what was found, in sentences, tables and figures; for a terminal, and as one HTML page.

The page holds its pictures, opens offline, and suits light and dark.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxcrit.core.console import visible
from jaxcrit.core.files import write_bytes, write_text
from jaxcrit.reporting import tables
from jaxcrit.reporting.following import following

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

# Of run.json: stands higher on the page already, or repeats other entries to identify the run.
SHOWN_ELSEWHERE = ("chosen", "warnings", "determines", "result")


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture: how it is drawn, and what it shows.

    Attributes:
        name: file name in the run directory; a path below it where the figure belongs to one dataset of several.
        draw: draws on an empty matplotlib figure; usually `on_axes`, around a function of data and axes.
        caption: one sentence, also read out in place of the picture.
        size: width and height in inches.
        left: inches on the left, for the names of rows.
    """

    name: str
    draw: Callable[[Canvas], None]
    caption: str
    size: tuple[float, float] = (6.2, 4.2)
    left: float = 0.9

    def canvas(self) -> Canvas:
        """The figure as matplotlib's."""
        from matplotlib.figure import Figure as Canvas

        made = Canvas(figsize=self.size, dpi=144)
        self.draw(made)
        _place(made, self.left)
        return as_text(made)

    def png(self) -> bytes:
        """The figure as PNG bytes: no dates, no versions, so that the same data give the same bytes."""
        return _png(self.canvas())

    def both(self) -> tuple[bytes, bytes]:
        """The same, and the same for a dark page."""
        from jaxcrit.reporting.dark import darkened

        canvas = self.canvas()
        return _png(canvas), _png(darkened(canvas))

    def write(self, folder: Path) -> bytes:
        """Writes the PNG bytes into a directory, and returns them."""
        png = self.png()
        write_bytes(folder / self.name, png)
        return png


def _png(canvas: Canvas) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    # `savefig` would draw everything once more, without pixels, before it draws.
    FigureCanvasAgg(canvas).print_png(buffer, metadata={"Software": None}, pil_kwargs={"compress_level": 3})
    return buffer.getvalue()


def as_text(canvas: Canvas) -> Canvas:
    """The figure with every text as it stands: a name with ``$`` is no formula, and nothing in it is obeyed."""
    from matplotlib.text import Text

    for text in canvas.findobj(Text):
        assert isinstance(text, Text)
        if (told := text.get_text()) and ("$" in told or visible(told) != told):
            text.set_parse_math(False)
            text.set_text(visible(told))
    return canvas


# Inches right (more where there is an axis), below, above and between panels.
_MARGINS = {"right": 0.2, "axis": 0.65, "bottom": 0.55, "top": 0.5, "across": 0.6, "down": 0.5}


def _place(canvas: Canvas, left: float) -> None:
    """Gives panels fixed margins; a layout engine draws all labels twice to find them, half of a figure's time."""
    width, height = canvas.get_size_inches()
    spec = canvas.axes[0].get_subplotspec()
    assert spec is not None
    grid = spec.get_topmost_subplotspec().get_gridspec()
    (rows, columns), at = grid.get_geometry(), _MARGINS
    right = at["right"] + at["axis"] * any(axes.yaxis.get_label_position() == "right" for axes in canvas.axes)
    # What is between panels is given relative to their mean size.
    wide = (width - left - right - (columns - 1) * at["across"]) / columns
    high = (height - at["bottom"] - at["top"] - (rows - 1) * at["down"]) / rows
    canvas.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        bottom=at["bottom"] / height,
        top=1 - at["top"] / height,
        wspace=at["across"] / wide,
        hspace=at["down"] / high,
    )


def on_axes(draw: Callable[..., None], *data: Any, **options: Any) -> Callable[[Canvas], None]:
    """Turns a function ``(data, axes) -> None`` into one that draws on an empty figure of one panel."""
    return lambda canvas: draw(*data, canvas.subplots(), **options)


def rows_title(run: Mapping[str, Any]) -> str:
    """Which rows a run is about, for the title of a figure: names of the datasets, number of samples."""
    return f"{', '.join(run['data'])}, {num_samples(run)} samples"


def num_samples(run: Mapping[str, Any]) -> int:
    """How many samples a run is about, over all its datasets."""
    return sum(one["num_samples"] for one in run["data"].values())


def template(name: str) -> Any:
    """A page's template (jinja2's ``Template``): text is escaped, and control characters in it are shown as such."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxcrit.reporting", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    return environment.get_template(name)


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        title: heading on the page.
        note: sentence under it, or empty.
        table: function of ``style`` (bold marks for a terminal) that gives the text table; or the table itself.
        figures: pictures under the table.
        brief: what the terminal shows instead; None for the table, empty for nothing.
    """

    title: str
    note: str
    table: str | Callable[[bool], str]
    figures: Sequence[Figure] = ()
    brief: str | None = None

    def text(self, style: bool = False) -> str:
        """The table."""
        return self.table if isinstance(self.table, str) else self.table(style)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a run found, for people.

    Attributes:
        headline: the answer, then how sure it is, a sentence each.
        warnings: what would mislead a reader, a line each.
        sections: tables and figures.
        caveats: how to read it, a sentence each; on the page alone.
        notes: further sentences, such as what it cost.
        configs: text for other trainers by file name; on the page alone.
        follows: whether the next command is told; not where it would rest on what the report doubts.
    """

    headline: Sequence[str]
    warnings: Sequence[str] = ()
    sections: Sequence[Section] = ()
    caveats: Sequence[str] = ()
    notes: Sequence[str] = ()
    configs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    follows: bool = True

    def text(self, width: int = tables.WIDTH, *, style: bool = False) -> str:
        """The report for a terminal: tables, then sentences, filled to a width.

        Args:
            width: columns.
            style: bold marks.
        """
        token = tables.COLUMNS.set(width)
        try:
            texts = [section.text(style) if section.brief is None else section.brief for section in self.sections]
        finally:
            tables.COLUMNS.reset(token)
        shown = [text for text in texts if text]
        sentences = [*self.headline, *self.notes, *(f"warning: {line}" for line in self.warnings)]
        # A path breaks nowhere, or it could not be copied.
        how: dict[str, Any] = {"subsequent_indent": "  ", "break_on_hyphens": False, "break_long_words": False}
        told = [textwrap.fill(visible(line), width, **how) for line in sentences]
        return "\n".join(["\n\n".join(shown), "", *told] if shown else told)

    def write(self, out: Path, record: Mapping[str, Any]) -> Path:
        """Writes every figure and ``report.html`` into a run directory.

        Args:
            out: run directory.
            record: content of ``run.json``, for the part that says where the numbers come from.

        Returns:
            The page's path.
        """
        pictures = {figure.name: figure.both() for section in self.sections for figure in section.figures}
        for name, (png, _) in pictures.items():
            write_bytes(out / name, png)
        page = out / "report.html"
        steps = following(record["command"], record.get("config", {}), str(out)) if self.follows else {}
        write_text(page, self._html(pictures, record, steps))
        return page

    def _html(
        self, pictures: Mapping[str, tuple[bytes, bytes]], record: Mapping[str, Any], steps: Mapping[str, str]
    ) -> str:
        provenance = {key: value for key, value in record.items() if key not in SHOWN_ELSEWHERE}
        return template("report.html.j2").render(
            headlines=[*self.headline, *self.notes],
            warnings=self.warnings,
            command=record["command"],
            stored=record.get("model", {}).get("dequantised_from", ""),
            sections=self.sections,
            sources={name: [_data_url(png) for png in both] for name, both in pictures.items()},
            configs=self.configs,
            caveats=self.caveats,
            steps=steps,
            provenance=list(_flat(provenance)),
        )


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Rows of names and values of nested JSON."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            yield f"{prefix}{key}", text if text else "(default)"
