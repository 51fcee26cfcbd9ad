"""JSON Schemas (draft 2020-12) of the files that are shared, made of the declarations that read them.

``python -m jaxcrit.reporting.schemas jaxcrit/assets/schemas`` writes them again. They say what can be said so: that
columns are of one length, or layers within the model, is checked by the readers alone.
"""

from __future__ import annotations

import json
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from jaxcrit.core.files import FORMAT_VERSION, VERSIONS, Npz, write_text
from jaxcrit.core.layers import LAYERS_FORMAT, SCORES_FORMAT, ChosenLayers, ScoresFile
from jaxcrit.core.schema import Array, Range
from jaxcrit.evidence.fingerprint import HOLDS

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_PLAIN = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null", None: "null"}
# numpy's ``dtype.str`` by the letters of `Array`.
_DTYPES = {"f": "^[<>]f[248]$", "iu": "^[<>|][iu][1248]$", "b": "^[|]b1$", "U": "^[<>]U[0-9]+$"}


def schema_of(kind: Any) -> dict[str, Any]:
    """The schema of a declaration, see `jaxcrit.core.schema`."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return {}
    if origin is Annotated:
        return {**schema_of(parts[0]), **_bounds(parts[1])}
    if origin in (Union, types.UnionType):
        return {"anyOf": [schema_of(one) for one in parts]}
    if origin is Literal:
        return {"enum": list(parts)}
    if origin is list:
        return {"type": "array", "items": schema_of(parts[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema_of(parts[1])}
    if typing.is_typeddict(kind):
        hints = typing.get_type_hints(kind, include_extras=True)
        return _object({name: schema_of(hint) for name, hint in hints.items()}, sorted(kind.__required_keys__))
    return {"type": _PLAIN[kind]}


def _bounds(bounds: Range) -> dict[str, Any]:
    lowest = {"exclusiveMinimum" if bounds.above else "minimum": bounds.lowest}
    return {name: one for name, one in {**lowest, "maximum": bounds.highest}.items() if abs(one) != float("inf")}


def _object(properties: Mapping[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "required": required}


def file_schema(form: str, content: Any, about: str) -> dict[str, Any]:
    """The schema of a JSON file of a format, with what every file begins with."""
    version = VERSIONS.get(form, FORMAT_VERSION)
    found = schema_of(content)
    head = {"format": {"const": form}, "format_version": {"type": "integer", "minimum": 1, "maximum": version}}
    found["properties"] = head | found["properties"]
    found["required"] = [*head, *found["required"]]
    return {"$schema": DIALECT, "$id": f"urn:{form}:{version}", "title": form, "description": about, **found}


def npz_schema(kind: Npz, about: str) -> dict[str, Any]:
    """The schema of an npz as ``{"meta": ..., "arrays": {name: {"dtype": dtype.str, "shape": [...]}}}``."""
    whole = file_schema(kind.format, kind.meta, about)
    outside = {name: whole.pop(name) for name in ("$schema", "$id", "title", "description")}
    arrays = {name: _array(one) for name, one in kind.arrays.items()}
    required = sorted(name for name, one in kind.arrays.items() if not one.optional)
    return {**outside, **_object({"meta": whole, "arrays": _object(arrays, required)}, ["meta", "arrays"])}


def _array(one: Array) -> dict[str, Any]:
    shape = one.shape or ()
    sizes = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0},
        "minItems": len(shape),
        "maxItems": len(shape),
    }
    said = _object({"dtype": {"type": "string", "pattern": _DTYPES[one.kinds]}, "shape": sizes}, ["dtype", "shape"])
    return {"description": f"[{', '.join(map(str, shape))}]", **said}


def schemas() -> dict[str, dict[str, Any]]:
    """All of them, by name of file."""
    return {
        "scores-1.schema.json": file_schema(
            SCORES_FORMAT, ScoresFile, "Scores of all layers by key; values, valid and stderr have num_layers entries."
        ),
        "layers-1.schema.json": file_schema(
            LAYERS_FORMAT, ChosenLayers, "Chosen layers, 0-based and below num_layers, and why these."
        ),
        "fingerprint-1.schema.json": npz_schema(
            HOLDS,
            "An npz as JSON, dtype being numpy's dtype.str: gram are the centred Gram matrices of L layers, upper"
            " triangles of N samples row by row, P = N (N + 1) / 2.",
        ),
    }


def write(folder: Path) -> None:
    """Writes them to a folder."""
    for name, schema in schemas().items():
        write_text(folder / name, json.dumps(schema, indent=1) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
