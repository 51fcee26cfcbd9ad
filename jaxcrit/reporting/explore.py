"""The explorer: one HTML file over any number of runs, which opens offline and asks nothing of a network.

Vega-Lite draws; its code comes from the package vl-convert-python. That code and CKA are packed, as gzip in base64:
898 kB of code take 407 kB, the matrices of 20 runs of 32 layers and 10 of 16 take 352 kB in place of 865. Python writes
data and specifications. The page's policy lets run what this module put there, by hash, and nothing else: Vega
interprets its expressions in place of compiling them, so that ``eval`` stays forbidden.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from jaxcrit import __version__
from jaxcrit.core.console import visible
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import in_bucket, plain
from jaxcrit.core.layers import LayerScores
from jaxcrit.core.selections import default_count
from jaxcrit.reporting import explore_charts as charts
from jaxcrit.reporting.explore_reading import Source, choice_of, depths
from jaxcrit.reporting.report import template
from jaxcrit.selection.correlation import circle, spearman_matrix

LARGEST = 1_500_000  # bytes of a page
MOST_AGREEING = 150  # scores of one depth between which ρ is computed


def explorer_page(sources: Sequence[Source], *, trim: int = 2) -> str:
    """The page of runs.

    Args:
        sources: what was read of them.
        trim: layers at each end that a selection never chooses.

    Raises:
        UserError: vl-convert-python is not there, or the page would be too large without CKA too, which is left out of
            the last runs first.
    """
    library, data = _vega(), page_data(sources, trim=trim)
    while True:
        page = _render(sources, data, library, trim)
        excess = len(page.encode()) - LARGEST
        if excess <= 0:
            return page
        if not data["cka"]:
            raise UserError(
                f"explore: expected a page of at most {LARGEST:,} bytes, got {LARGEST + excess:,} of"
                f" {len(sources)} runs and {len(data['series'])} scores; give fewer runs"
            )
        each = len(_packed(_embedded(data["cka"]))) / len(data["cka"])
        for _ in range(min(len(data["cka"]), 1 + int(excess / each))):
            data["cka"].popitem()


def page_data(sources: Sequence[Source], *, trim: int) -> dict[str, Any]:
    """Everything that the page shows, as JSON: numbers are those of the files, to the last digit.

    Args:
        sources: what was read.
        trim: layers at each end that a selection never chooses.
    """
    every = [(number, score) for number, one in enumerate(sources) for score in one.scores.values()]
    data = {
        "series": [_series(id, number, sources[number], score, trim) for id, (number, score) in enumerate(every)],
        "cka": {str(number): _matrices(one.cka) for number, one in enumerate(sources) if one.cka},
        "agreement": _agreement([score for _, score in every]),
    }
    found: dict[str, Any] = plain(data)
    return found


def _series(id: int, number: int, source: Source, score: LayerScores, trim: int) -> dict[str, Any]:
    """A row of the data ``series``; columns by layer, empty where there are none."""
    layers = np.arange(score.num_layers)
    ranking = score.ranking()
    share, place = np.full(len(layers), np.nan), np.full(len(layers), np.nan)
    share[ranking] = np.arange(len(ranking)) / max(1, len(ranking) - 1)
    may = ranking[(ranking >= trim) & (ranking < len(layers) - trim)]
    place[may] = np.arange(1, len(may) + 1)
    beside = source.reference(score)
    none = np.array([])
    panel = visible(score.name) + (", mean rank" if score.meta.get("consensus") else "")
    return {
        "id": id,
        "source": number,
        "label": f"{visible(source.name)}: {panel}",
        "panel": panel,
        "run": visible(source.name),
        "criterion": visible(score.name),
        "model": visible(source.model),
        "dataset": visible(source.dataset),
        "bias": visible(str(score.meta.get("bias", ""))),
        "direction": score.direction,
        "num_layers": score.num_layers,
        "what": beside.what if beside else "",
        "layer": layers.tolist(),
        "value": np.where(score.valid, score.values, np.nan).tolist(),
        "stderr": (none if score.stderr is None else score.stderr).tolist(),
        "reference": (none if beside is None else beside.values).tolist(),
        "stddev": (none if beside is None or beside.stddev is None else beside.stddev).tolist(),
        "share": share.tolist(),
        "place": place.tolist(),
        "ranking": may.tolist(),
    }


def _matrices(cka: Mapping[str, np.ndarray]) -> dict[str, list[list[float]]]:
    """CKA by estimator, row by row; of a symmetric matrix the lower triangle."""
    found = {}
    for name in ("debiased", "biased"):
        rows = cka[name].tolist()
        alike = cka[name].shape[0] == cka[name].shape[1] and np.array_equal(cka[name], cka[name].T, equal_nan=True)
        found[name] = [row[: place + 1] for place, row in enumerate(rows)] if alike else rows
    return found


def _agreement(scores: Sequence[LayerScores]) -> list[dict[str, Any]]:
    """Of scores of one depth each: their numbers, and ρ of every two, the lower triangle; null for a circle."""
    found = []
    by_depth = sorted(range(len(scores)), key=lambda id: scores[id].num_layers)
    for _, group in itertools.groupby(by_depth, key=lambda id: scores[id].num_layers):
        ids = list(group)[:MOST_AGREEING]
        matrix = spearman_matrix([scores[id] for id in ids])
        rho = [
            [np.nan if circle(scores[a], scores[b]) else float(matrix[i, j]) for j, b in enumerate(ids[: i + 1])]
            for i, a in enumerate(ids)
        ]
        found.append({"ids": ids, "rho": rho})
    return found


def _vega() -> str:
    """The code of Vega, Vega-Lite and vega-embed, which leaves `vegaEmbed` behind.

    Raises:
        UserError: the package that brings it is not there.
    """
    try:
        import vl_convert
    except ImportError:
        raise UserError("explore: needs vl-convert-python: pip install 'jaxcrit[explore]'") from None
    return f"(() => {{{vl_convert.javascript_bundle('window.vegaEmbed = vegaEmbed;')}}})();"


def _packed(text: str) -> str:
    """Text as gzip in base64."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode("ascii")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
    return f"'sha256-{digest}'"


def _file(name: str) -> str:
    return resources.files("jaxcrit.reporting").joinpath(name).read_text(encoding="utf-8")


def _embedded(value: Any) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _template(name: str, **values: Any) -> str:
    from markupsafe import Markup

    safe = {key: Markup(value) for key, value in values.pop("raw", {}).items()}
    return str(template(name).render(**values, **safe, version=__version__))


def _render(sources: Sequence[Source], data: Mapping[str, Any], library: str, trim: int) -> str:
    style, script = _file("page.css") + _file("explore.css"), _file("explore.js")
    series = data["series"]
    specs = {
        "heat": charts.heat_map(),
        "curves": charts.curves(),
        "cka": charts.cka(),
        "agreement": charts.agreement(),
    }
    options = {name: list(dict.fromkeys(one[name] for one in series if one[name])) for name in _FILTERS}
    by = [one.chosen.criterion if one.chosen else "" for one in sources]
    keys = [key if key in one.scores else next(iter(one.scores)) for key, one in zip(by, sources, strict=True)]
    first = [one["id"] for one in series if one["criterion"] == keys[one["source"]]][:6]
    left_out = [one.name for number, one in enumerate(sources) if one.cka and str(number) not in data["cka"]]
    return _template(
        "explore.html.j2",
        sources=sources,
        rows=index_rows(sources, trim),
        links=None,
        series=series,
        filters=options,
        first=first,
        count=default_count(sources[0].num_layers),
        most=max(1, *(len(one["ranking"]) for one in series)),
        cka=[(number, sources[int(number)].name) for number in data["cka"]],
        left_out=left_out,
        depths=depths(sources),
        raw={
            "style": style,
            "script": script,
            "vega": _packed(library),
            "pairs": _packed(_embedded(data["cka"])),
            "data": _embedded({name: part for name, part in data.items() if name != "cka"}),
            "specs": _embedded(specs),
            "policy": f"default-src 'none'; script-src {_hash(script)} {_hash(library)}; style-src {_hash(style)}; "
            "base-uri 'none'; form-action 'none'",
            "licence": _file("vega.txt"),
        },
    )


_FILTERS = ("model", "dataset", "criterion", "bias")


def index_rows(sources: Sequence[Source], trim: int = 2) -> list[dict[str, Any]]:
    """A row for each choice of layers: the one that a run made, else one by each of its scores."""
    rows = []
    for place, one in enumerate(sources):
        own = [one.scores[key] for key in [one.chosen.criterion if one.chosen else ""] if key in one.scores]
        for score in own or one.scores.values():
            layers, sure = choice_of(one, score, trim)
            rows.append({"place": place, "source": one, "criterion": score.name, "layers": layers, "sure": sure})
    return rows


def index_page(sources: Sequence[Source], folder: Path, out: Path, *, trim: int = 2) -> str:
    """The page of a folder: a row for each choice, with a link to what it comes from.

    Args:
        sources: what was read of it.
        folder: the folder.
        out: file that the page is written to, for the links.
        trim: layers at each end that critical:K never chooses.
    """

    def link(source: Source) -> str:
        page = next((one for one in (source.path, source.path.parent) if (one / "report.html").exists()), None)
        target = source.path / "scores.json" if page is None else page / "report.html"
        if in_bucket(target) != in_bucket(out):
            return ""
        return quote(os.path.relpath(target.resolve(), out.parent.resolve()))

    style = _file("page.css") + _file("explore.css")
    return _template(
        "index.html.j2",
        folder=folder.name or str(folder),
        sources=sources,
        rows=index_rows(sources, trim),
        links=[link(one) for one in sources],
        raw={"style": style, "policy": f"default-src 'none'; style-src {_hash(style)}; base-uri 'none'"},
    )
