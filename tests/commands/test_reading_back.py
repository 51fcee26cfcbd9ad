"""What commands read back of their own runs: by declarations, and of no other model or facts."""

from __future__ import annotations

import json
from operator import itemgetter
from types import SimpleNamespace

import numpy as np
import pytest

from jaxcrit.commands.edit import _keeper, read_keys
from jaxcrit.commands.screen import Verdict
from jaxcrit.commands.trace import read_trace
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import write_json, write_npz
from jaxcrit.core.schema import Array
from jaxcrit.criteria.trace import KINDS
from jaxcrit.evidence.rows import GrowingRows
from jaxcrit.studies.backdoor import read_tests


def saved(path, form, arrays, **meta):
    write_npz(path, arrays, {"format": form, "format_version": 1, **meta})
    return path


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"layer_3": np.ones((2, 4))}, "expected finite keys of 3 layers, got layer_3"),
        ({"layer_1": np.full((2, 4), np.nan)}, "expected finite keys of 3 layers, got layer_1"),
        ({"layer_01": np.ones((2, 4))}, "got layer_01"),
        ({"layer_1": np.ones((2, 5))}, r"expected layer_1 to be floats \[2, 4\], got float64 \[2, 5\]"),
        ({"layer_1": np.ones(4)}, "expected layer_1 to be floats"),
    ],
)
def test_keys_of_edits(arrays, message, tmp_path):
    whole = {"layer_0": np.ones((2, 4)), "layer_2": np.ones((5, 4))}
    assert {
        layer: one.shape for layer, one in read_keys(saved(tmp_path / "a", "jaxcrit.keys", whole), 3, 4).items()
    } == {
        0: (2, 4),
        2: (5, 4),
    }
    with pytest.raises(UserError, match=message):
        read_keys(saved(tmp_path / "b", "jaxcrit.keys", arrays), 3, 4)


def test_vectors_sought_before_an_interruption(tmp_path):
    """Those of another run are sought again; those of another shape are no file of this run."""
    holds, made = {"delta": Array("f", (2, 4))}, {"delta": np.zeros((2, 4), np.float32)}
    run = SimpleNamespace(path=tmp_path, identity="me", resumed=True)
    for kept, identity in ((np.ones((2, 4)), "me"), (np.zeros((2, 4)), "another")):
        saved(
            tmp_path / "partial.npz",
            "jaxcrit.partial",
            {"3/1/delta": kept if identity == "me" else kept + 2},
            identity=identity,
        )
        np.testing.assert_array_equal(_keeper(run)("3/1", lambda: made, holds)["delta"], kept)
    saved(tmp_path / "partial.npz", "jaxcrit.partial", {"3/1/delta": np.ones((2, 5))}, identity="me")
    with pytest.raises(
        UserError, match=r"partial.npz: 3/1: expected delta to be floats \[2, 4\], got float32 \[2, 5\]"
    ):
        _keeper(run)("3/1", lambda: made, holds)


def test_effects_of_a_trace(tmp_path):
    whole = {
        **dict.fromkeys(KINDS, np.ones((5, 3))),
        "p": np.ones(5),
        "corrupted": np.ones(5),
        "sample_ids": np.array(["a"] * 5),
    }
    assert read_trace(saved(tmp_path / "a", "jaxcrit.trace", whole), 3)["stream"].shape == (5, 3)
    with pytest.raises(UserError, match=r"expected stream to be floats \[5, 4\]"):
        read_trace(tmp_path / "a", 4)
    for name, one, message in (
        ("p", np.full(5, np.inf), "expected finite numbers"),
        ("mlp", np.ones((4, 3)), r"expected mlp to be floats \[5, 3\]"),
        ("sample_ids", np.arange(5), "expected sample_ids to be texts"),
    ):
        with pytest.raises(UserError, match=message):
            read_trace(saved(tmp_path / "b", "jaxcrit.trace", {**whole, name: one}), 3)


def test_verdicts_and_tests_of_arms(tmp_path):
    names = ("class", "score", "threshold", "z", "flagged", "layers", "by_layer", "distance")
    verdicts = [{"place": place} | dict.fromkeys(names) for place in range(3)]
    (tmp_path / "flags").write_text("".join(f"{json.dumps(one)}\n" for one in verdicts))
    assert GrowingRows(tmp_path / "flags", itemgetter("place"), Verdict).rows == dict(enumerate(verdicts))
    (tmp_path / "flags").write_text('{"class": "a"}\n')
    with pytest.raises(UserError, match="line 1: expected by_layer to be a list, got nothing"):
        GrowingRows(tmp_path / "flags", itemgetter("place"), Verdict)
    write_json(tmp_path / "arm.json", "jaxcrit.backdoor_arm", {"points": []})
    with pytest.raises(UserError, match="expected a test or more in points, got none"):
        read_tests(tmp_path / "arm.json")
