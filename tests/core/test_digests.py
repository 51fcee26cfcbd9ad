"""Digests: of files in run.json, of run.json itself, of arrays on any mesh."""

from __future__ import annotations

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxcrit.commands.main import main
from jaxcrit.core import digests
from jaxcrit.core.digests import differing_arrays, files_of, of_arrays
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_json, read_npz, write_json, write_npz, write_text
from jaxcrit.core.layers import read_scores
from jaxcrit.core.rundir import RunDirectory, read_record
from jaxcrit.parallel.mesh import make_mesh

SCORES = {"num_layers": 2, "scores": {"delta": {"values": [0.5, 0.25], "valid": [True, True], "direction": "low"}}}


@pytest.fixture
def run(tmp_path):
    """A complete run of a few files."""
    directory = RunDirectory.open(tmp_path / "run", {"count": 3})
    directory.begin({"command": "test"})
    write_json(directory.path / "scores.json", "jaxcrit.scores", SCORES)
    (directory.path / "rows").mkdir()
    write_npz(directory.path / "rows" / "cka.npz", {"a": np.arange(4.0)}, {"format": "jaxcrit.cka"})
    (directory.path / "events").write_bytes(b"of another library")
    directory.finish({"command": "test"})
    directory.release()
    return directory.path


def test_every_file_is_listed_with_the_digest_of_its_content(run):
    listed = read_record(run)["digests"]["files"]
    assert sorted(listed) == ["events", "rows/cka.npz", "scores.json"]
    for name, one in listed.items():
        content = (run / name).read_bytes()
        assert one == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_what_is_no_file_of_the_run_is_not_listed(run):
    for name in (".lock", ".scores.json.x1.part", "partial.npz", "inner/run.json", "inner/scores.json", "inner/a/b"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
    assert sorted(files_of(run)) == ["events", "rows/cka.npz", "scores.json"]


def test_every_flipped_bit_of_the_record_is_found(run):
    file = run / "run.json"
    whole = file.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"run\.json"):
            read_record(run)
    file.write_bytes(whole)
    assert read_record(run)["status"] == "complete"


def test_a_changed_file_is_refused_by_whoever_reads_it(run):
    for name, read in (("scores.json", read_scores), ("rows/cka.npz", read_npz)):
        read(run / name)
    changed = json.dumps(json.loads((run / "scores.json").read_text()) | {"remark": "by hand"})
    (run / "scores.json").write_text(changed)
    write_npz(run / "rows" / "cka.npz", {"a": np.arange(4.0) + 1e-12}, {"format": "jaxcrit.cka"})
    for name, read in (("scores.json", read_scores), ("rows/cka.npz", read_npz)):
        with pytest.raises(UserError, match=f"{name}: is not the file that its run wrote, by its digest in run.json"):
            read(run / name)


def test_what_no_run_vouches_for_is_said_once(run, tmp_path, capsys):
    apart = tmp_path / "scores.json"
    apart.write_bytes((run / "scores.json").read_bytes())
    for _ in range(2):
        read_scores(apart)
    assert capsys.readouterr().err == f"jaxcrit: {apart}: lies apart from its run; its structure alone was checked\n"
    (run / "rows" / "scores.json").write_bytes(apart.read_bytes())
    read_scores(run / "rows" / "scores.json")
    assert "is not among the files of its run; its structure alone" in capsys.readouterr().err
    record = {key: value for key, value in read_record(run).items() if key != "digests"}
    (run / "run.json").write_text(json.dumps(record))
    read_scores(run / "scores.json")
    assert f"{run}: was written without digests; the structure of its files alone" in capsys.readouterr().err
    read_npz(run / "rows" / "cka.npz")  # nobody is given one apart from its run
    assert capsys.readouterr().err == ""


def test_what_no_run_vouches_for_is_said_behind_what_a_command_did_and_not_before_an_error(run, tmp_path, capsys):
    (tmp_path / "scores.json").write_bytes((run / "scores.json").read_bytes())
    assert main(["select", f"--scores={tmp_path / 'scores.json'}", "--criterion=detla"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "scores.json").rename(tmp_path / "other" / "scores.json")
    assert main(["select", f"--scores={tmp_path / 'other' / 'scores.json'}", "--criterion=delta", "--trim=0"]) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("layers 1 of 2") and "lies apart from its run" in second


def test_what_a_run_in_progress_has_written_it_reads_back(tmp_path, capsys):
    directory = RunDirectory.open(tmp_path, {})
    directory.begin({})
    write_json(tmp_path / "scores.json", "jaxcrit.scores", SCORES)
    read_scores(tmp_path / "scores.json")
    (tmp_path / "scores.json").write_text((tmp_path / "scores.json").read_text().replace("0.5", "0.4"))
    with pytest.raises(UserError, match="is not the file that its run wrote"):
        read_scores(tmp_path / "scores.json")
    directory.release()
    read_scores(tmp_path / "scores.json")  # of a launch that was killed nothing is known
    assert capsys.readouterr().err == ""


def test_another_programs_run_json_vouches_for_nothing(tmp_path, capsys):
    write_text(tmp_path / "run.json", '{"format": "theirs"}')
    write_json(tmp_path / "layers.json", "jaxcrit.layers", {"layers": [1]})
    assert read_json(tmp_path / "layers.json", "jaxcrit.layers")["layers"] == [1]
    assert "lies apart from its run" in capsys.readouterr().err


def test_large_files_of_a_checkpoint_are_listed_by_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "LARGE", 10)
    for name, size in (("checkpoints/3/d/0", 11), ("checkpoints/3/meta", 10), ("fingerprint.npz", 11)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    listed = digests.take(tmp_path, {})
    assert listed["checkpoints/3/d/0"] == {"bytes": 11}
    assert "sha256" in listed["checkpoints/3/meta"] and "sha256" in listed["fingerprint.npz"]


def test_arrays_have_the_same_digest_wherever_they_are_read(tmp_path):
    rng = np.random.default_rng(0)
    tree = {"a": rng.standard_normal((8, 4, 6)).astype(np.float32), "b": {"c": np.int32(3), "d": np.ones(8, bool)}}
    tree["e"] = jnp.asarray(rng.standard_normal((16, 2)), jnp.bfloat16)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    specs = {"a": PartitionSpec("fsdp", "tensor"), "b": {"c": PartitionSpec(), "d": PartitionSpec("data")}}
    specs["e"] = PartitionSpec(("data", "fsdp"))
    spread = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs)
    here = jax.tree.map(jnp.asarray, tree)
    assert {name: len(pieces) for name, pieces in of_arrays(spread).items()} == {"a": 4, "b.c": 1, "b.d": 2, "e": 4}
    for known in (of_arrays(spread), of_arrays(here), of_arrays(tree)):
        for read in (spread, here):
            assert differing_arrays(read, known) == []
            for name, bit in (("a", 1), ("e", 1)):
                raw = np.array(tree[name]).view(np.uint8)
                raw[-1, -1] ^= bit
                changed = jnp.asarray(raw.view(np.asarray(tree[name]).dtype))
                assert differing_arrays({**read, name: changed}, known) == [name]
    known = of_arrays(here)
    assert differing_arrays({**here, "new": here["a"]}, known) == ["new"]
    assert differing_arrays({**here, "a": here["a"][:4]}, known) == ["a"]
    assert differing_arrays(here, known | {"a": {"0:8,0:4,0:3": known["a"]["0:8,0:4,0:6"]}}) == ["a"]
