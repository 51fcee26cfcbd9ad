"""Rows of metrics as trackers keep them, and a tracker that takes no run."""

import contextlib
import json
import sqlite3

import pytest

from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import TRACKERS, FinetuneOptions
from jaxcrit.training import trackers
from jaxcrit.training.trackers import scalars, tracked

ROWS = [
    {"kind": "train", "step": 1, "loss": 2.5, "aux_0": None, "learning_rate": 1e-3},
    {"kind": "drift", "step": 1, "weights": [0.0, 0.25], "cka": None, "seconds": 0.5},
    {"kind": "layers", "step": 2, "layers": [3]},
    {"kind": "eval", "step": 2, "loss": 2.0},
]
KEPT = [
    {"train/loss": 2.5, "train/learning_rate": 1e-3},
    {"drift/weights/0": 0.0, "drift/weights/1": 0.25, "drift/seconds": 0.5},
    {},
    {"eval/loss": 2.0},
]


def test_the_numbers_of_a_row():
    assert [scalars(row) for row in ROWS] == KEPT


def hear(tracker, out, rows=ROWS, step=0):
    with tracked(tracker, out, step, {"layers": "2"}) as listen:
        for row in rows:
            listen(row)


def test_trackio_keeps_them_in_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "run" / "trackio"))  # read when it is first imported
    pytest.importorskip("trackio", reason="pip install -e '.[trackio]'")
    hear("trackio", tmp_path / "run")
    (file,) = tmp_path.glob("run/trackio/*.db")
    with contextlib.closing(sqlite3.connect(file)) as opened:
        found = [(step, json.loads(metrics)) for step, metrics in opened.execute("select step, metrics from metrics")]
    assert [one for one in found if one[1]] == [
        (row["step"], kept) for row, kept in zip(ROWS, KEPT, strict=True) if kept
    ]


def test_wandb_keeps_them_in_the_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="pip install -e '.[wandb]'")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "run").mkdir()
    hear("wandb", tmp_path / "run")
    wandb.teardown()  # returns when its own process has written everything
    (file,) = tmp_path.glob("run/wandb/offline-run-*/*.wandb")
    content, found = file.read_bytes()[7:], {}  # behind its mark: checksum, length, kind and a record, again and again
    while content:
        size = int.from_bytes(content[4:6], "little")
        history = Record.FromString(content[7 : 7 + size]).history
        content = content[7 + size :]
        items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in history.item}
        found |= {(items["_step"], name): value for name, value in items.items() if name[0] != "_"}
    expected = {
        (row["step"], name): value for row, kept in zip(ROWS, KEPT, strict=True) for name, value in kept.items()
    }
    assert found == expected
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"--track=wandb: takes no run .* WANDB_MODE=offline") as caught:
        hear("wandb", tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_tracker_that_takes_no_run_is_one_line(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def down(*given):
        raise ConnectionError("no server\nat all")
        yield

    monkeypatch.setitem(trackers._TRACKERS, "wandb", down)
    with pytest.raises(UserError, match=r"^--track=wandb: takes no run \(no server\); .* or leave it out$"):
        hear("wandb", tmp_path)


def test_what_is_missing_is_said_before_anything_runs(monkeypatch):
    assert TRACKERS.keys() == trackers._TRACKERS.keys()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in TRACKERS:
        with pytest.raises(UserError, match=rf"--track={name}: needs .*; pip install 'jaxcrit\[{name}\]'"):
            FinetuneOptions(track=name).check()
    with pytest.raises(UserError, match="--track=wandb: keeps local files"):
        FinetuneOptions(track="wandb", out="gs://a/b").check()
