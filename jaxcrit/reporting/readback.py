"""What another trainer makes of a file, beside what a selection means."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxcrit.core.errors import UserError
from jaxcrit.core.files import as_path
from jaxcrit.core.layers import LayerSet
from jaxcrit.core.reading import parse_json, read_text, too_deep
from jaxcrit.core.schema import conform
from jaxcrit.core.selections import span
from jaxcrit.reporting.exporters import FORMATS, Asked, Format, format_of, tensors_of
from jaxcrit.reporting.tensors import Trained, layer_of

_LARGEST = 2**22  # bytes of a file that names what trains


@dataclasses.dataclass(frozen=True)
class ReadBack:
    """What a tool makes of a file.

    Attributes:
        format: the format.
        trained: weights that train, or stay, by tensor or module.
        meant: what the selection means.
    """

    format: Format
    trained: Trained
    meant: Trained

    @property
    def differing(self) -> dict[str, tuple[int, int]]:
        """By tensor the weights that do, and those that were meant to, where these differ."""
        names = dict.fromkeys([*self.meant, *self.trained])
        both = {name: (self.trained.get(name, 0), self.meant.get(name, 0)) for name in names}
        return {name: pair for name, pair in both.items() if pair[0] != pair[1]}

    def lines(self) -> list[str]:
        """What trains, folded over layers, and every difference from the selection."""
        told = [f"{name}  {size:,} weights" for name, size in folded(self.trained)]
        told.append(f"{len(self.trained)} tensors, {sum(self.trained.values()):,} weights {self.format.verb}")
        places: dict[tuple[str, bool, bool], list[tuple[str, int, int]]] = {}
        for name, (does, meant) in folded(self.differing):
            where, _, tail = name.rpartition("}.")
            places.setdefault((where + "}" if where else "", does > 0, meant > 0), []).append((tail, does, meant))
        for (where, *_), found in places.items():
            does, meant = (f"{sum(sizes):,}" for sizes in ([one[1] for one in found], [one[2] for one in found]))
            of = f"{where}: of each layer " if where else ""
            tails = ", ".join(sorted(one[0] for one in found))
            told.append(f"differs: {of}{does} weights {self.format.verb}, {meant} were meant to: {tails}")
        return told


def folded(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Entries with layers of equal value in one, such as ``model.layers.{3-5,9}.mlp.up_proj.weight``."""
    groups: dict[tuple[str, Any], list[int]] = {}
    for name, value in found.items():
        layer = layer_of(name)
        key = name if layer is None else name.replace(f".{layer}", ".{}", 1)
        groups.setdefault((key, value), []).extend([] if layer is None else [layer])
    return [
        (key.replace("{}", f"{{{span(sorted(layers))}}}", 1) if layers else key, value)
        for (key, value), layers in groups.items()
    ]


def read_back(path: str | Path, fmt: str, layer_set: LayerSet, asked: Asked) -> ReadBack:
    """Reads a file as its tool would.

    Args:
        path: the file.
        fmt: its format; empty for the first whose mark is in it.
        layer_set: what it is to say.
        asked: what is said beside; with tensors.

    Raises:
        UserError: no such file, of no known format, or what the tool refuses.
    """
    path = as_path(path)
    try:
        text = read_text(path, "a file that another trainer reads", _LARGEST)
    except FileNotFoundError:
        raise UserError(f"--check={path}: no such file") from None
    found = [name for name, one in FORMATS.items() if one.mark in text]
    if not fmt and not found:
        raise UserError(f"{path}: of no format that is known; say which: --format={'|'.join(FORMATS)}")
    return understood(text, fmt or found[0], layer_set, asked, str(path))


def understood(text: str, fmt: str, layer_set: LayerSet, asked: Asked, where: str) -> ReadBack:
    """What the tool of a format makes of a text.

    Args:
        text: content of a file.
        fmt: its format.
        layer_set: what it is to say.
        asked: what is said beside; with tensors.
        where: the file, for messages.

    Raises:
        UserError: an unknown format, or what the tool refuses.
    """
    form, tensors = format_of(fmt), tensors_of(asked, fmt)
    content = text if form.content is str else conform(_parsed(text, where), form.content, where)
    try:
        trained = form.trains(content, tensors)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return ReadBack(form, trained, form.means(layer_set, tensors, asked))


def _parsed(text: str, path: str) -> Any:
    """JSON or YAML."""
    if path.endswith(".json") or text.lstrip()[:1] in ("{", "["):
        return parse_json(text, path)
    import yaml

    try:
        # An alias may stand for another without end: a few lines would be taken for as many entries as one likes.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise UserError(f"{path}: YAML with aliases (*name) is not read here; write out what they stand for")
        found = yaml.safe_load(text)
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise UserError(f"{path}: expected YAML, got something else ({str(error).splitlines()[0]})") from None
    if too_deep(found):
        raise UserError(f"{path}: expected YAML, got lists and mappings nested too deep")
    return found
