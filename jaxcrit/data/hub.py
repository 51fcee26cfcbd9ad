"""Rows through the `datasets` library: sets of the hub, and sets that it saved in a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxcrit.core.errors import UserError, did_you_mean, listed
from jaxcrit.core.reading import plain_tree
from jaxcrit.data.containers import without_nulls
from jaxcrit.data.tokenizer import quiet

Row = dict[str, Any]


def from_hub(asked: str, name: str, configuration: str, split: str, preferred: str, advice: str) -> list[Row]:
    """Rows of a set of the hub, nulls left out.

    Args:
        asked: text of ``--data``, for the message.
        name: ``owner/name``.
        configuration: name of one of several configurations of the set; else empty.
        split: split by the set's own name; empty for the only one, or the preferred one.
        preferred: split to take of several where none is asked for.
        advice: what else to do, for the message.

    Raises:
        UserError: it cannot be had, or its split has to be named.
    """
    try:
        with quiet():  # the hub's client counts its retries aloud
            import datasets

            which = [name, configuration] if configuration else [name]
            found = datasets.load_dataset(*which, split=split or None)
    # No network, no such package, a proxy that refuses: these errors share no base class.
    except Exception as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"--data={asked}: {name} cannot be had from the hub ({type(error).__name__}: {first}); {advice}"
        ) from None
    return _rows(found, name, "", preferred)


def from_directory(path: Path, split: str, preferred: str) -> list[Row]:
    """Rows of a directory that ``save_to_disk`` wrote, nulls left out; arguments as of `from_hub`.

    Raises:
        UserError: it cannot be read, or its split has to be named.
    """
    plain_tree(path, "a saved dataset", (".json",))
    try:
        with quiet():
            import datasets

            found = datasets.load_from_disk(str(path))
    except Exception as error:  # as above
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"{path}: is a saved dataset, and cannot be read ({first})") from None
    return _rows(found, str(path), split, preferred)


def is_saved(path: Path) -> bool:
    """Whether a directory was written by ``save_to_disk``, with or without splits."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _rows(found: Any, where: str, split: str, preferred: str) -> list[Row]:
    if not isinstance(found, dict):
        if split:
            raise UserError(f"--split={split}: {where} has no splits; leave it out")
        return _listed(found, where)
    names = list(found)
    chosen = split or (names[0] if len(names) == 1 else preferred)
    if chosen not in names:
        asked = f"--split={split}: " if split else ""
        raise UserError(
            f"{asked}{where}: expected a split of {listed(names)}{did_you_mean(split, names)}; choose one with --split"
        )
    return _listed(found[chosen], where)


def _listed(dataset: Any, where: str) -> list[Row]:
    try:
        return [without_nulls(row) for row in dataset.to_list()]
    except UnicodeDecodeError as error:  # its files are opened without a look at what they hold
        raise UserError(f"{where}: expected text in UTF-8, got something else ({error})") from None
