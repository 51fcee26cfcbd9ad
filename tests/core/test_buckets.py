"""A directory in a bucket serves as one on a disk, and says in a line why where it does not."""

from __future__ import annotations

import errno
import sys

import numpy as np
import pytest

from jaxcrit.core import files
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import GrowingText, as_path, atomic_path, read_json, read_npz, write_npz, write_text
from jaxcrit.core.rundir import RunDirectory


def test_a_run_directory(storage):
    path = as_path("gs://bucket/some/run")
    directory = RunDirectory.open(path, {"window": 3})
    assert not directory.resumed and storage.files("bucket/") == {}, "looking leaves nothing"
    directory.begin({"determines": {"window": 3}})
    write_npz(path / "sub" / "x.npz", {"a": np.arange(3)}, {"format": "jaxcrit.test"})
    directory.finish({"determines": {"window": 3}})
    again = RunDirectory.open(as_path("gs://bucket/some/run/"), {"window": 3})
    assert again.resumed and again.path == path
    again.discard()
    assert list(storage.files("bucket/")) == ["some/run/run.json", "some/run/sub/x.npz"], "an earlier run's stay"
    with pytest.raises(UserError, match=r"--out=gs://bucket/some/run: holds another run \(window 3 there, 5 now"):
        RunDirectory.open(path, {"window": 5})
    with pytest.raises(UserError, match="holds files that are no jaxcrit run"):
        RunDirectory.open(path.parent, {})
    with pytest.raises(UserError, match="expected a directory, got a file"):
        RunDirectory.open(path / "run.json", {})
    directory.discard()
    assert storage.files("bucket/") == {}


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # so gcsfs does
def test_files_are_the_same_bytes_as_on_a_disk(storage, tmp_path):
    for folder in (tmp_path, as_path("gs://bucket/run")):
        write_npz(folder / "x.npz", {"a": np.arange(3)}, {"format": "jaxcrit.test"})
        write_text(folder / "x.txt", "é\n")
        with atomic_path(folder / "large") as temporary:  # large enough to go in pieces
            temporary.write_bytes(bytes(6 * 2**20 + 1))
        with pytest.raises(RuntimeError), atomic_path(folder / "half") as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert storage.files("bucket/run/") == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    folder = as_path("gs://bucket/run")
    assert read_npz("gs://bucket/run/x.npz")[0]["a"].tolist() == [0, 1, 2]
    assert (folder / "x.txt").read_text() == "é\n"
    assert sorted(path.name for path in folder.iterdir()) == ["large", "x.npz", "x.txt"]
    assert [str(path) for path in folder.parent.glob("*/x.npz")] == ["gs://bucket/run/x.npz"]
    assert [str(path) for path in folder.parent.rglob("x.txt")] == ["gs://bucket/run/x.txt"]
    (folder / "x.txt").unlink()
    (folder / "x.txt").unlink(missing_ok=True)
    with pytest.raises(UserError, match="gs://bucket/run/absent: no such file"):
        read_json(folder / "absent", "jaxcrit.test")


def test_text_that_grows_is_written_now_and_then(storage, monkeypatch):
    now = 0.0
    monkeypatch.setattr(files.time, "monotonic", lambda: now)
    text = GrowingText(as_path("gs://bucket/log"))
    text.start("0\n")
    for now in range(1, 31):
        text.append(f"{now}\n")
    assert len(storage.puts) == 4, "once at the start, then every 10 s"
    text.flush()
    text.flush()
    assert storage.files("bucket/")["log"] == "".join(f"{number}\n" for number in range(31)).encode()
    assert len(storage.puts) == 5


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("gs://sealed/run", "cannot be written .robot does not have storage.objects.create access.; choose another"),
        ("gs://absent/run", "cannot be written .no such object or bucket."),
    ],
)
def test_a_bucket_that_cannot_be_written(storage, out, message):
    with pytest.raises(UserError, match=f"^--out={out}: {message}") as caught:
        RunDirectory.open(as_path(out), {})
    assert "\n" not in str(caught.value)
    assert "absent" not in storage.buckets, "no bucket is made"


def test_a_bucket_that_lets_nothing_be_written_any_more(storage):
    directory = RunDirectory.open(as_path("gs://bucket/run"), {})
    directory.begin({})
    storage.refused["bucket"] = {"POST", "PUT"}
    with pytest.raises(OSError) as caught:
        directory.finish({})
    assert caught.value.errno == errno.EACCES and caught.value.filename == "gs://bucket/run/run.json"
    assert caught.value.strerror == "robot does not have storage.objects.create access"


@pytest.mark.parametrize("text", ["s3://bucket/run", "gs://", "gs:///"])
def test_other_addresses(text):
    with pytest.raises(UserError, match=f"^{text}: expected a local path or gs://BUCKET/DIR"):
        as_path(text)


def test_without_gcsfs(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"^gs://b/run: needs gcsfs: pip install 'jaxcrit\[gcs\]'$"):
        as_path("gs://b/run")
