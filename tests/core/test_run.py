"""The life of a run directory: complete is said last, mistakes leave nothing, what is precious stays."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import TypedDict

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxcrit.core import rundir
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import GrowingText, atomic_path, write_text
from jaxcrit.core.options import Options, option
from jaxcrit.core.run import Facts, running
from jaxcrit.core.rundir import RunDirectory


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
    assert found["time"]["peak_gib"] > 0.01


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


def test_a_launch_that_fails_takes_back_what_it_made_and_nothing_else(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError), start(tmp_path / "mine") as run:
        folder = run.folder("rows", alone=False)
        write_text(folder / "scores.json", "{}")
        (run.path / "checkpoints" / "1").mkdir(parents=True)
        (folder / "notes.txt").write_text("the user's")
        raise UserError("no such row")
    left = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))]
    assert left == ["mine", "mine/rows", "mine/rows/notes.txt"]


def test_what_a_kill_leaves_before_the_first_file_is_no_other_run(tmp_path):
    for name in (".lock", ".run.json.k3x_9a.part"):
        (tmp_path / name).write_text("half")
    with start(tmp_path) as run:
        (run.path / "rows").mkdir()
        (run.path / "rows" / ".scores.json.abc.part").write_text("half")
    with start(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["rows", "run.json"]
    (tmp_path / "run.json").unlink()
    (tmp_path / "notes.txt").write_text("the user's")
    with pytest.raises(UserError, match="holds files that are no jaxcrit run"), start(tmp_path):
        pass


def test_two_launches_given_one_directory_do_not_touch_each_other(tmp_path):
    """The second is refused while the first writes, and also where it had looked before the first began."""
    with start(tmp_path / "run") as first:
        write_text(first.path / "scores.json", "{}")
        with pytest.raises(UserError, match=rf"process {os.getpid()} on \S+ is writing there"), start(tmp_path / "run"):
            pass
    early = RunDirectory.open(tmp_path / "other", {"count": 4})
    with start(tmp_path / "other"):
        pass
    with pytest.raises(UserError, match=r"holds another run \(.*\)"):
        early.begin({})
    early.discard()
    same = RunDirectory.open(tmp_path / "third", first.directory.determines)
    with start(tmp_path / "third"):
        pass
    with pytest.raises(UserError, match="another process has written there meanwhile"):
        same.begin({})
    same.discard()
    for name in ("run", "other", "third"):
        assert read(tmp_path / name)["status"] == "complete" and not (tmp_path / name / ".lock").exists()
    assert (tmp_path / "run" / "scores.json").exists()


def test_the_lock_of_a_process_that_was_killed_means_nothing(tmp_path):
    text = "import sys, time; from pathlib import Path; from jaxcrit.core.rundir import RunDirectory;"
    text += "RunDirectory.open(Path(sys.argv[1]), {}).begin({}); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", text, str(tmp_path / "run")], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        mine = RunDirectory.open(tmp_path / "run", {})
        with pytest.raises(UserError, match=f"process {other.pid} on"):
            mine.begin({})
        other.kill()
    assert (tmp_path / "run" / ".lock").exists()
    mine.begin({})
    mine.finish({})
    mine.release()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


def test_the_lock_that_a_kill_leaves_behind_a_complete_run_goes(tmp_path):
    with start(tmp_path):
        pass
    for _ in range(2):
        (tmp_path / ".lock").touch()
        with start(tmp_path) as again:
            assert again.complete
        assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_launch_without_locks_notices_that_another_has_begun(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(rundir.fcntl, "flock", none)
    with (
        pytest.raises(UserError, match="another process has begun to write there since"),
        start(tmp_path / "run"),
        start(tmp_path / "run") as second,
    ):
        assert second.earlier["status"] == "running"
    assert "its file system has no locks (No locks available)" in capsys.readouterr().err
    assert read(tmp_path / "run")["status"] == "complete"  # of the second, which nobody disturbed


def test_files_are_on_the_disk_before_complete_is_said(tmp_path, monkeypatch):
    """In the order of calls: every file before its name, every name before ``complete``."""
    calls, real, rename = [], os.fsync, Path.replace

    def fsync(handle):
        calls.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        real(handle)

    def replace(path, target):
        calls.append(("name", str(target)))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    with start(tmp_path) as run:
        write_text(run.path / "scores.json", "{}")
        (run.path / "events").write_bytes(b"of another library")
    named = calls.index(("name", str(tmp_path / "scores.json")))
    assert calls[named - 1][1].endswith(".part") and calls[named + 1] == ("sync", str(tmp_path))
    last = max(place for place, call in enumerate(calls) if call == ("name", str(tmp_path / "run.json")))
    assert calls.index(("sync", str(tmp_path / "events"))) < last == len(calls) - 2
    assert calls[-1] == ("sync", str(tmp_path))


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        with pytest.raises(OSError, match=r"File too large: .*/long\.txt'$"):
            write_text(tmp_path / "long.txt", "x" * 2000)
        with pytest.raises(OSError, match=r"File too large: .*/grown\.jsonl'$"):
            GrowingText(tmp_path / "grown.jsonl").append("x" * 2000)
        named = pytest.raises(OSError, match=r"File too large: .*/arrays\.safetensors'$")
        with named, atomic_path(tmp_path / "arrays.safetensors") as path:
            save_file({"a": np.zeros(1000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir()), "not even a file that is empty"
    for line in ("one\n", "two\n"):
        GrowingText(tmp_path / "grown.jsonl").append(line)
    assert (tmp_path / "grown.jsonl").read_text() == "one\ntwo\n"


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
