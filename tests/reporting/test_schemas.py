"""Schemas of shared files: made of what readers declare, and of one mind with these on sound and damaged files."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

import jsonschema
import numpy as np
import pytest

from jaxcrit.commands.main import main
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import write_npz
from jaxcrit.core.layers import LayerSet, read_scores
from jaxcrit.evidence.fingerprint import read_grams
from jaxcrit.reporting import schemas

SCORES, LAYERS, FINGERPRINT = (f"{name}-1.schema.json" for name in ("scores", "layers", "fingerprint"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run as a user has one."""
    out = tmp_path_factory.mktemp("run") / "run"
    assert main(["analyze", "--data=demo:arithmetic", "--limit=8", f"--out={out}"]) == 0
    return out


def validator(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schemas.schemas()[name])


def described(arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, Any]:
    """An npz as its schema has it."""
    return {
        "meta": meta,
        "arrays": {name: {"dtype": one.dtype.str, "shape": list(one.shape)} for name, one in arrays.items()},
    }


def held(path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with np.load(path) as npz:
        arrays = dict(npz)
    return arrays, json.loads(str(arrays.pop("meta")))


def test_the_files_in_the_package_are_current(tmp_path):
    schemas.write(tmp_path)
    shipped = resources.files("jaxcrit").joinpath("assets/schemas")
    again = "python -m jaxcrit.reporting.schemas jaxcrit/assets/schemas"
    assert {one.name for one in shipped.iterdir()} == {SCORES, LAYERS, FINGERPRINT}
    for name, schema in schemas.schemas().items():
        assert shipped.joinpath(name).read_text() == (tmp_path / name).read_text(), again
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema["$id"] == f"urn:{schema['title']}:1"


def test_what_a_run_writes_is_valid(run):
    for name, file in ((SCORES, "scores.json"), (LAYERS, "layers.json")):
        validator(name).validate(json.loads((run / file).read_text()))
    validator(FINGERPRINT).validate(described(*held(run / "fingerprint.npz")))


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Every place in a JSON value."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*at, key))


def damaged(value: Any) -> Iterator[Any]:
    """The value with something else at one of its places, or nothing."""
    for place in places(value):
        if not place:
            continue
        for other in (None, "x", -1, 0, 1.5, 10**9, True, [], {}, ...):
            made = copy.deepcopy(value)
            at = made
            for key in place[:-1]:
                at = at[key]
            if other is ...:
                del at[place[-1]]
            else:
                at[place[-1]] = other
            yield made


def shortened(content: dict[str, Any]) -> dict[str, Any]:
    """Scores of three layers, with everything that a score may hold."""
    score = next(iter(content["scores"].values()))
    trained = {"layers": [0], "criteria": ["delta"], "rules": ["critical:1"]}
    meta = {**score["meta"], "trained": trained, "chance": [0.5] * 3, "unchanged": 1.0, "of": 2}
    three = {"values": [0.5, None, 1], "valid": [True, False, True], "stderr": [0.1, None, 0.2], "meta": meta}
    return {**content, "num_layers": 3, "scores": {"delta": {**score, **three}}}


# What no schema says, by the words of the reader's message: columns of one length, layers within the model.
BEYOND = ("values in every score", "expected layers 0 to")


@pytest.mark.parametrize(
    ("name", "file", "read"), [(SCORES, "scores.json", read_scores), (LAYERS, "layers.json", LayerSet.load)]
)
def test_schema_and_reader_refuse_the_same_files(name, file, read, run, tmp_path):
    content = json.loads((run / file).read_text())
    checks, refusals, beyond, path = validator(name), 0, 0, tmp_path / file
    for one in damaged(shortened(content) if file == "scores.json" else content):
        path.write_text(json.dumps(one))
        try:
            read(path)
            refused = ""
        except UserError as error:
            refused = str(error)
        if any(words in refused for words in BEYOND):
            beyond += 1
        else:
            assert checks.is_valid(one) == (not refused), (one, refused)
        refusals += bool(refused)
    assert refusals > 3 * beyond and refusals > 50


def test_schema_and_reader_refuse_the_same_fingerprints(run, tmp_path):
    arrays, meta = held(run / "fingerprint.npz")
    checks, path = validator(FINGERPRINT), tmp_path / "fingerprint.npz"
    cases = [(arrays, one) for one in damaged(meta)]
    for name, one in arrays.items():
        for other in (one[:, None], one.astype("U9"), one.astype(bool), np.zeros(()), None):
            cases.append(({key: value for key, value in {**arrays, name: other}.items() if value is not None}, meta))
    refusals = 0
    for held_arrays, held_meta in cases:
        write_npz(path, held_arrays, held_meta)
        try:
            read_grams(path)
            refused = ""
        except UserError as error:
            refused = str(error)
        # How many layers and samples belong together is beyond a schema.
        if "expected Grams of" not in refused:
            assert checks.is_valid(described(held_arrays, held_meta)) == (not refused), (held_meta, refused)
        refusals += bool(refused)
    assert refusals > 60


def test_the_statistics_can_be_redone_from_the_shared_files_alone(run):
    """Debiased δ by its formula from fingerprint.npz and the facts that scores.json has beside the values."""
    arrays, about = held(run / "fingerprint.npz")
    score = json.loads((run / "scores.json").read_text())["scores"]["delta_debiased"]
    meta, count = score["meta"], len(arrays["sample_ids"])
    assert (meta["bias"], meta["kernel"], meta["num_samples"]) == ("debiased", about["kernel"], count)
    grams = np.zeros((about["num_layers"], count, count))
    rows, columns = np.triu_indices(count)
    grams[:, rows, columns] = grams[:, columns, rows] = arrays["gram"]

    def hsic(a, b):  # Song et al. 2012, of Grams without their diagonals
        a, b = (one * (1 - np.eye(count)) for one in (a, b))
        whole = a.sum() * b.sum() / ((count - 1) * (count - 2)) - 2 * (a @ b).sum() / (count - 2)
        return (np.trace(a @ b) + whole) / (count * (count - 3))

    depth, reach = len(grams), meta["window"] // 2
    for layer in range(reach, depth - reach):
        near = range(layer - reach, layer + reach + 1)
        own = hsic(grams[layer], grams[layer])
        each = [
            hsic(grams[layer], grams[other]) / np.sqrt(own * hsic(grams[other], grams[other]))
            for other in near
            if meta["include_self"] or other != layer
        ]
        assert np.mean(each) == pytest.approx(score["values"][layer], abs=1e-5)
