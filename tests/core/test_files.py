"""Files are whole or absent, the same for the same content, and refused in one line where they are damaged."""

from __future__ import annotations

import stat

import numpy as np
import pytest

from jaxcrit.core.errors import UserError, did_you_mean, listed
from jaxcrit.core.files import atomic_path, read_json, read_npz, write_json, write_npz, write_text
from jaxcrit.core.hashing import sample_id


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path):
    write_text(tmp_path / "f", "old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "f") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_text() == "old"


def test_files_are_readable_to_others(tmp_path):
    write_text(tmp_path / "f", "x")
    plain = tmp_path / "plain"
    plain.write_text("x")
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "f.json", "jaxcrit.test", {"value": float("nan")})
    assert not list(tmp_path.iterdir())


def test_npz_round_trip_and_same_bytes(tmp_path):
    arrays = {"a": np.arange(3.0), "b": np.zeros((2, 2), np.float32)}
    for name in ("one", "two"):
        write_npz(tmp_path / name, arrays, {"n": 3, "format": "jaxcrit.test"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    back, meta = read_npz(tmp_path / "one")
    assert meta == {"n": 3, "format": "jaxcrit.test"}
    np.testing.assert_array_equal(back["a"], arrays["a"])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"{}"])
def test_a_damaged_npz_is_one_line(content, tmp_path):
    (tmp_path / "f.npz").write_bytes(content)
    with pytest.raises(UserError, match="expected an npz written by jaxcrit") as caught:
        read_npz(tmp_path / "f.npz")
    assert "\n" not in str(caught.value)


def test_an_npz_with_objects_is_not_unpickled(tmp_path):
    np.savez(tmp_path / "f.npz", meta=np.array([{}], object))
    with pytest.raises(UserError):
        read_npz(tmp_path / "f.npz")


def test_an_npz_without_meta_is_not_ours(tmp_path):
    np.savez(tmp_path / "f.npz", a=np.zeros(2))
    with pytest.raises(UserError, match="meta"):
        read_npz(tmp_path / "f.npz")
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "absent.json", "jaxcrit.test")


def test_identity_of_a_row_is_its_content():
    assert sample_id({"a": 1, "b": "é"}) == sample_id({"b": "é", "a": 1})
    assert sample_id({"a": 1}) != sample_id({"a": "1"})


def test_words_of_errors():
    assert did_you_mean("analyse", ["analyze", "select"]) == " (did you mean 'analyze'?)"
    assert did_you_mean("xyz", ["analyze"]) == ""
    assert listed(range(3)) == "0, 1, 2" and listed(range(10), 2) == "0, 1 and 8 more"
