"""The life of a run directory: complete is said last, mistakes leave nothing, what is precious stays."""

from __future__ import annotations

import dataclasses
import json
from typing import TypedDict

import pytest

from jaxcrit.core.errors import UserError
from jaxcrit.core.options import Options, option
from jaxcrit.core.run import Facts, running


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked(Options):
    out: str = option("", "directory", free="says where, not what")
    count: int = option(3, "how many")


MODEL = Facts("tiny", {"path": "tiny", "hash": "abc", "family": "llama"})
DATA = Facts("rows", {"source": "rows.jsonl", "num_samples": 4, "hash": "def"})


def read(folder):
    return json.loads((folder / "run.json").read_text())


def start(out, **given):
    return running("test", Asked(out=str(out), **given), models={"model": MODEL}, datasets=[DATA])


def test_complete_is_said_when_everything_is_written(tmp_path):
    with start(tmp_path / "run") as run:
        assert read(run.path)["status"] == "running"
        run.record["result"] = {"answer": 42}
        run.times["passes"] = 2
    found = read(tmp_path / "run")
    assert found["status"] == "complete" and found["format_version"] == 2
    assert found["model"] == MODEL.facts and found["data"] == {"rows": DATA.facts}
    assert found["config"] == {"out": str(tmp_path / "run"), "count": 3}
    assert found["determines"]["config"] == {"count": 3} and found["determines"]["model_hash"] == "abc"
    assert found["result"] == {"answer": 42} and found["time"]["passes"] == 2 and found["time"]["seconds"] >= 0


def test_a_report_that_cannot_be_written_leaves_a_run_that_goes_on(tmp_path):
    with pytest.raises(OSError, match="full"), start(tmp_path / "run") as run:
        (run.path / "scores.json").write_text("{}")
        raise OSError("the disk is full")
    assert read(tmp_path / "run")["status"] == "running"
    with start(tmp_path / "run") as run:
        assert run.earlier["status"] == "running" and (run.path / "scores.json").exists()
    assert read(tmp_path / "run")["status"] == "complete"


def test_a_mistake_leaves_nothing_but_what_is_precious(tmp_path):
    with pytest.raises(UserError), start(tmp_path / "run") as run:
        raise UserError("no such row")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError), start(tmp_path / "run") as run:
        run.precious = True
        raise UserError("the loss is nan")
    assert read(tmp_path / "run")["status"] == "running"


def test_another_run_is_refused_and_a_complete_one_is_read_back_where_asked(tmp_path):
    with start(tmp_path / "run"):
        pass
    with pytest.raises(UserError, match="count 3 there, 4 now"), start(tmp_path / "run", count=4):
        pass
    before = (tmp_path / "run" / "run.json").read_bytes()
    asked = Asked(out=str(tmp_path / "run"))
    with running("test", asked, models={"model": MODEL}, datasets=[DATA], read_back=True) as run:
        assert run.complete
    assert (tmp_path / "run" / "run.json").read_bytes() == before


class Answered(TypedDict):
    result: dict[str, int]


def test_a_complete_run_that_is_read_back_holds_what_it_should(tmp_path):
    with start(tmp_path / "run"):
        pass
    asked = Asked(out=str(tmp_path / "run"))
    message = r"run.json: expected result to be a JSON object, got nothing; the file is damaged"
    with (
        pytest.raises(UserError, match=message),
        running("test", asked, models={"model": MODEL}, datasets=[DATA], read_back=Answered),
    ):
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"determines": [1], "identity": "x"}, "expected determines to be a JSON object, got"),
        ({"identity": 3}, "expected identity to be text, got 3"),
        ({"status": "done"}, "expected status to be running or complete, got 'done'"),
        ({"model": None}, "expected model to be a JSON object, got None"),
        ({"data": {"rows": 3}}, "expected data.rows to be a JSON object, got 3"),
    ],
)
def test_a_damaged_record_is_one_line(changes, message, tmp_path):
    with start(tmp_path / "run"):
        pass
    (tmp_path / "run" / "run.json").write_text(json.dumps(read(tmp_path / "run") | changes))
    with pytest.raises(UserError) as caught, start(tmp_path / "run"):
        pass
    assert message in str(caught.value) and "run.json" in str(caught.value)


def test_links_in_a_run_are_refused_through_which_it_would_write_elsewhere(tmp_path):
    with start(tmp_path / "run"):
        pass
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "rows").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"holds links \(rows\)"), start(tmp_path / "run"):
        pass
    (tmp_path / "run" / "rows").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with start(tmp_path / "link") as run:
        assert run.directory.resumed


@dataclasses.dataclass
class Rows:
    name: str

    def describe(self):
        return {"num_samples": 4, "hash": self.name}


def test_names_of_datasets_are_no_paths(tmp_path):
    for names, message in (([".."], "can name a directory"), (["a", "report.html"], "as results are called")):
        datasets = [Rows(name) for name in names]
        asked = Asked(out=str(tmp_path / "run"))
        with pytest.raises(UserError, match=message), running("test", asked, models={"m": MODEL}, datasets=datasets):
            pass
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_says_what_goes_on(tmp_path):
    told = "keeps what is done, and the same command goes on"
    with pytest.raises(KeyboardInterrupt, match=told), start(tmp_path / "run"):
        raise KeyboardInterrupt
    assert read(tmp_path / "run")["status"] == "running"


def test_without_a_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with running("test", Asked(), models={"model": MODEL}, datasets=[DATA], keep=False) as run:
        run.save()
        assert not run.kept
    assert run.record["time"]["seconds"] >= 0 and list(tmp_path.iterdir()) == []


def test_a_run_of_the_first_shape_is_read(tmp_path):
    from jaxcrit.core.files import read_json

    file = tmp_path / "run.json"
    for version, fine in ((1, True), (2, True), (3, False), (True, False)):
        file.write_text(json.dumps({"format": "jaxcrit.run", "format_version": version, "status": "complete"}))
        if fine:
            assert read_json(file, "jaxcrit.run")["status"] == "complete"
        else:
            with pytest.raises(UserError, match="expected format_version 2"):
                read_json(file, "jaxcrit.run")
