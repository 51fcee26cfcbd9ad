"""``jaxcrit explore``: one HTML page over any number of runs; loads no model, and computes on no device."""

from __future__ import annotations

import dataclasses

from jaxcrit.core import console
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import as_path, write_text
from jaxcrit.core.groups import BY_HASH, WHERE
from jaxcrit.core.options import Options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExploreOptions(Options, title="what", positional=("run",)):
    """What ``jaxcrit explore`` is asked."""

    run: tuple[str, ...] = option((), "run directory; several are given as words", word="DIR", free=BY_HASH)
    index: str = option("", "instead: a table of all scores.json below a folder", word="DIR", free=BY_HASH)
    trim: int = option(2, "layers at each end that --layers never names", lowest=0)
    out: str = option("", "page to write, such as --out=page.html", word="FILE", free=WHERE)


OPTIONS = ExploreOptions


def run(options: ExploreOptions) -> int:
    """Reads the runs, writes the page, says where it is."""
    from jaxcrit.reporting.explore import explorer_page, index_page
    from jaxcrit.reporting.explore_reading import find_runs, read_runs

    if bool(options.run) == bool(options.index):
        raise UserError(
            "explore: expected jaxcrit explore RUN [RUN ...] --out=page.html, or --index=DIR in their place"
        )
    if not options.out:
        raise UserError("explore: expected --out=page.html, the page to write")
    out = as_path(options.out)
    if out.exists():
        raise UserError(f"--out={options.out}: is there already; choose another name, or remove it")
    if options.index:
        folder = as_path(options.index)
        sources = find_runs(folder)
        page = index_page(sources, folder, out, trim=options.trim)
    else:
        sources = read_runs(options.run)
        page = explorer_page(sources, trim=options.trim)
    try:
        write_text(out, page)
    except OSError as error:
        raise UserError(f"--out={options.out}: cannot be written ({error.strerror})") from None
    scores = sum(len(one.scores) for one in sources)
    console.tell(f"page: {out} ({len(page.encode()) / 1e6:.2f} MB, {scores} scores of {len(sources)} folders)")
    return 0
