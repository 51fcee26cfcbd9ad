"""Vega-Lite specifications of the explorer's charts.

The page gives the data, as far as they pass the filters: a row for each score with its columns as arrays; CKA of two
layers; ρ of two scores. Parameters are ``k``, and ``share``, whether layers stand by their share of the depth. Colours
of text and lines are those of the page (``explore.css``).
"""

from __future__ import annotations

from typing import Any

from jaxcrit.reporting.plots import LINES

_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # a name: nothing is fetched
_CONFIG = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {"domain": False, "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal"},
    "legend": {"labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal"},
    "header": {"labelFontSize": 12, "labelFontWeight": "bold"},
    "aria": False,  # of every mark; the page has tables in their place
}
_COLUMNS = ["layer", "value", "stderr", "reference", "stddev", "share", "place"]
_PARAMS = [{"name": "k", "value": 1}, {"name": "share", "value": False}]
_AS_LAYERS = [
    {"flatten": _COLUMNS},
    {"filter": "isValid(datum.value)"},
    {"calculate": "share ? datum.layer / datum.num_layers : datum.layer - 0.5", "as": "left"},
    {"calculate": "share ? (datum.layer + 1) / datum.num_layers : datum.layer + 0.5", "as": "right"},
    {"calculate": "(datum.left + datum.right) / 2", "as": "middle"},
    {"calculate": "isValid(datum.place) && datum.place <= k ? 1 : 0", "as": "chosen"},
]
_LAYERS: dict[str, Any] = {
    "type": "quantitative",
    "scale": {"zero": False, "nice": False},
    "title": None,
    "axis": {
        "tickMinStep": {"expr": "share ? 0.1 : 1"},
        "grid": False,
        "labelExpr": "share ? format(datum.value, '.1f') : datum.value % 1 ? '' : format(datum.value, 'd')",
    },
}
_HEADER = {"title": None, "labelAngle": 0, "labelOrient": "top", "labelAnchor": "start", "labelPadding": 0}
# What the page tells of a mark under the mouse, by field. As an encoding it would be put together for thousands of
# marks, of which one is looked at.
_TOLD = {
    "label": "score",
    "layer": "layer",
    "value": "value",
    "stderr": "± s.e.",
    "reference": "set beside",
    "what": "which is",
    "place": "place, most critical first",
}
_HOVER = {"content": "data"}


def heat_map() -> dict[str, Any]:
    """Scores by layer: a row each, coloured by the place of the layer in its row; the K most critical framed."""
    above = {"orient": "top", "ticks": False, "labelPadding": 10}
    cell = {
        "mark": {"type": "rect", "cursor": "pointer", "strokeWidth": 2, "tooltip": _HOVER},
        "encoding": {
            "y": {"field": "panel", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 160}},
            "x": {**_LAYERS, "field": "left", "axis": {**_LAYERS["axis"], **above}},
            "x2": {"field": "right"},
            "color": {
                "field": "share",
                "type": "quantitative",
                "scale": {"scheme": "viridis", "domain": [1, 0]},
                "legend": {
                    "title": "place in its row",
                    "orient": "top",
                    "direction": "horizontal",
                    "values": [0, 1],
                    "labelExpr": "datum.value == 0 ? 'most critical' : 'least'",
                    "gradientLength": 120,
                },
            },
            "stroke": {"condition": {"test": "datum.chosen", "value": "#e6007e"}, "value": None},
            "order": {"field": "chosen", "type": "quantitative"},
        },
    }
    return {
        "$schema": _SCHEMA,
        "config": _CONFIG,
        "usermeta": {"told": _TOLD},
        "params": _PARAMS,
        "data": {"name": "rows"},
        "transform": _AS_LAYERS,
        "facet": {"row": {"field": "run", "sort": {"field": "id", "op": "min"}, "header": _HEADER}},
        "resolve": {"scale": {"y": "independent"}},
        "spacing": 20,
        "spec": {"width": 600, "height": {"step": 17}, **cell},
    }


def curves() -> dict[str, Any]:
    """The ticked scores over the layers, a panel for each criterion: values, 95 % bands, what they are set beside."""
    x = {"x": {**_LAYERS, "field": "middle"}}
    color = {
        "color": {
            "field": "label",
            "type": "nominal",
            "sort": None,
            "scale": {"range": [*LINES[:6], "#888888"]},
            "legend": {"orient": "bottom", "columns": 1, "title": None, "symbolType": "circle", "symbolOpacity": 1},
        }
    }
    value = {"type": "quantitative", "scale": {"zero": False}, "title": None}

    def band(opacity: float, low: str, high: str, dash: bool = False) -> dict[str, Any]:
        return {
            "mark": {"type": "area", "opacity": opacity, **({"color": "#888"} if dash else {})},
            "encoding": {
                **x,
                "y": {**value, "field": low},
                "y2": {"field": high},
                **({"detail": {"field": "label"}} if dash else color),
            },
        }

    line = {"mark": {"type": "line", "strokeWidth": 1.5}, "encoding": {**x, "y": {**value, "field": "value"}, **color}}
    point = {
        "mark": {"type": "point", "filled": True, "opacity": 1, "tooltip": _HOVER},
        "encoding": {
            **x,
            "y": {**value, "field": "value"},
            **color,
            "size": {"condition": {"test": "datum.chosen", "value": 110}, "value": 28},
        },
    }
    beside = {
        "mark": {"type": "line", "strokeDash": [4, 3], "strokeWidth": 1},
        "encoding": {**x, "y": {**value, "field": "beside"}, **color},
    }
    # What a score has not lies under its curve: panels without a row of a layer have no scale for it.
    ends = [{"calculate": "isValid(datum.reference) ? datum.reference : datum.value", "as": "beside"}]
    ends += [
        {"calculate": f"datum.{middle} {sign} 1.96 * (isValid(datum.{error}) ? datum.{error} : 0)", "as": name}
        for name, middle, error, sign in (
            ("low", "value", "stderr", "-"),
            ("high", "value", "stderr", "+"),
            ("null_low", "beside", "stddev", "-"),
            ("null_high", "beside", "stddev", "+"),
        )
    ]
    return {
        "$schema": _SCHEMA,
        "config": _CONFIG,
        "usermeta": {"told": _TOLD},
        "params": _PARAMS,
        "data": {"name": "rows"},
        "transform": [*_AS_LAYERS, *ends],
        "facet": {"row": {"field": "panel", "sort": {"field": "id", "op": "min"}, "header": _HEADER}},
        "resolve": {"scale": {"y": "independent"}},
        "spec": {
            "width": 600,
            "height": 190,
            "layer": [band(0.16, "null_low", "null_high", True), beside, band(0.2, "low", "high"), line, point],
        },
    }


def cka() -> dict[str, Any]:
    """CKA of every pair of layers of a run, by both estimators."""
    axis = {"type": "ordinal", "axis": {"labelOverlap": True, "labelAngle": 0}}
    return {
        "$schema": _SCHEMA,
        "config": _CONFIG,
        "usermeta": {"told": {"row": "layer", "column": "and layer", "estimator": "estimator", "cka": "CKA"}},
        "data": {"name": "rows"},
        "facet": {"field": "estimator", "sort": ["debiased", "biased"], "header": {"title": None}},
        "columns": 2,
        "spec": {
            "width": 300,
            "height": 300,
            "mark": {"type": "rect", "tooltip": _HOVER},
            "encoding": {
                "x": {**axis, "field": "column", "title": "layer"},
                "y": {**axis, "field": "row", "title": "layer", "sort": "descending"},
                "color": {
                    "field": "cka",
                    "type": "quantitative",
                    "scale": {"scheme": "magma", "domain": [0, 1], "clamp": True},
                    "legend": {"title": "CKA", "orient": "top", "direction": "horizontal", "gradientLength": 120},
                },
            },
        },
    }


def agreement() -> dict[str, Any]:
    """Spearman's ρ of every two scores that are shown."""
    axis = {"type": "nominal", "sort": None, "title": None}
    return {
        "$schema": _SCHEMA,
        "config": _CONFIG,
        "usermeta": {"told": {"row": "score", "column": "and score", "rho": "Spearman's ρ"}},
        "data": {"name": "rows"},
        "width": {"step": 24},
        "height": {"step": 17},
        "mark": {"type": "rect", "tooltip": _HOVER},
        "encoding": {
            "x": {**axis, "field": "column", "axis": {"orient": "top", "labelAngle": -60, "labelLimit": 150}},
            "y": {**axis, "field": "row", "axis": {"labelLimit": 210}},
            "color": {
                "field": "rho",
                "type": "quantitative",
                "scale": {"scheme": "purpleorange", "domain": [1, -1]},
                "legend": {"title": "ρ", "orient": "top", "direction": "horizontal", "gradientLength": 120},
            },
        },
    }
