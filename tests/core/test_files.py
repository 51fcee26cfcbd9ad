"""Files are whole or absent, the same for the same content, and refused in one line where they are damaged."""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from jaxcrit.core.errors import UserError, did_you_mean, listed
from jaxcrit.core.files import (
    Npz,
    as_path,
    atomic_path,
    check_name,
    read_json,
    read_lines,
    read_npz,
    write_json,
    write_npz,
    write_text,
)
from jaxcrit.core.hashing import sample_id
from jaxcrit.core.schema import Array


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


KIND = Npz("jaxcrit.test", {"a": Array("f", ("N",))}, dict[str, str | int])
HEADER = "{'descr':'<f8','fortran_order':False,'shape':(%s,)}\n"
NEGATIVE = HEADER.replace("(%s,)", "(-3,-1)")
NOTHINGS = HEADER.replace("f8", "U0") % 10**12
RECORDS = HEADER.replace("'<f8'", "[('x','<f8')]") % 3


def npz(file, meta='{"format": "jaxcrit.test", "format_version": 1}', header=HEADER % 3, twice=False, **how):
    """An npz of one array ``a`` and a meta entry, as its parts are given."""
    array, text = io.BytesIO(), io.BytesIO()
    head = header.encode()
    array.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + bytes(24))
    np.save(text, meta if isinstance(meta, np.ndarray) else np.array(meta))
    with zipfile.ZipFile(file, "w", **how) as archive:
        for name, content in (("a", array), ("meta", text), *([("a", array)] if twice else [])):
            archive.writestr(f"{name}.npy", content.getvalue())


DAMAGED = {
    "8 TB": ({"header": HEADER % 10**12}, "GiB, this machine has"),
    "more than there is": ({"header": HEADER % 4}, "expected 32 bytes of shape (4,), got 24"),
    "less than nothing": (
        {"header": NEGATIVE},
        "expected plain numbers",
    ),
    "endless nothings": (
        {"header": NOTHINGS},
        "expected plain",
    ),
    "records": ({"header": RECORDS}, "expected plain numbers"),
    "no header": ({"header": "(((((((((\n"}, "no header of an array"),
    "meta of another kind": ({"meta": np.arange(3)}, "expected a meta entry of text, got int64 [3]"),
    "meta no JSON": ({"meta": "{"}, "meta: expected JSON, got something else"),
    "meta a list": ({"meta": "[]"}, "expected format jaxcrit.test, got None"),
    "meta nested": ({"meta": "[" * 10**5}, "meta: expected JSON, got something else"),
    "meta NaN": ({"meta": '{"format": NaN}'}, "NaN is no number of JSON"),
    "later": ({"meta": '{"format": "jaxcrit.test", "format_version": 2}'}, "expected format_version 1, got 2"),
    "other meta": ({"meta": '{"format": "jaxcrit.test", "format_version": 1, "x": []}'}, "expected x to be text or"),
    "compressed": ({"compression": zipfile.ZIP_DEFLATED}, "expected a uncompressed"),
    "other dtype": ({"header": HEADER.replace("f8", "i8") % 3}, "expected a to be floats [3], got int64 [3]"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_an_npz_is_checked_before_it_is_read(damage, tmp_path):
    changes, message = DAMAGED[damage]
    npz(tmp_path / "f.npz", **changes)
    with pytest.raises(UserError) as caught:
        read_npz(tmp_path / "f.npz", KIND)
    assert str(caught.value).startswith(f"{tmp_path / 'f.npz'}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_npz_holds_each_array_once(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        npz(tmp_path / "f.npz", twice=True)
    with pytest.raises(UserError, match="expected each array once, got 'a' twice"):
        read_npz(tmp_path / "f.npz", KIND)


def test_every_flipped_byte_of_an_npz_is_found_or_changes_nothing(tmp_path):
    """Checksums of the archive cover the arrays; what they do not cover says nothing."""
    npz(tmp_path / "f.npz")
    whole, (expected, _) = (tmp_path / "f.npz").read_bytes(), read_npz(tmp_path / "f.npz", KIND)
    for place in range(len(whole)):
        (tmp_path / "f.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            found, _ = read_npz(tmp_path / "f.npz", KIND)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            np.testing.assert_array_equal(found["a"], expected["a"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff{}", "expected JSON of format jaxcrit.test, got something else"),
        (b"[" * 10**5, "expected JSON of format jaxcrit.test, got something else"),
        (b"[" * 70 + b"]" * 70, "nested deeper than 64"),
        (b'{"a": 1, "a": 2}', "a named twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "got something else"),
        (b'{"a": Infinity}', "Infinity is no number of JSON"),
        (b'{"format": "jaxcrit.test", "format_version": 1.0}', "expected format_version 1, got 1.0"),
        (b'{"format": ["jaxcrit.test"], "format_version": 1}', "expected format jaxcrit.test, got"),
        (b'{"format": "jaxcrit.test", "format_version": 1, "x": []}', "expected x to be text or"),
    ],
)
def test_json_is_what_its_standard_says_or_one_line(content, message, tmp_path):
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(tmp_path / "f.json", "jaxcrit.test", dict[str, str | int])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_never_ends_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        for read in (read_npz, lambda file: read_json(file, "jaxcrit.test"), lambda file: read_lines(Path(file))):
            with pytest.raises(UserError, match="got a device or pipe"):
                read(path)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="1,099,511,627,776 bytes"):
        read_json(tmp_path / "sparse", "jaxcrit.test")


def test_lines_that_grow(tmp_path):
    """Only what a kill has cut short is left out; letters that break lines elsewhere do not here."""
    file = tmp_path / "rows.jsonl"
    assert read_lines(file) == []
    file.write_bytes('{"a": "x\u2028y\x85"}\n{"a": "é'.encode()[:-1])
    assert read_lines(file, dict[str, str]) == [{"a": "x\u2028y\x85"}]
    for content, message in (
        (b'{"a": 1\n{}\n', "line 1: expected a JSON"),
        (b"{}\n7\n", "line 2: expected a JSON object"),
        (b'{"a": "\\uDcff"}\n', "line 1: expected UTF-8"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_lines(file)


@pytest.mark.parametrize("text", ["\0", "a/\0", "~nobody-here/x", "x" * 256, "a/" * 3000, "\ud800", "\udcff"])
def test_paths_that_no_system_has(text):
    with pytest.raises(UserError, match="expected a path"):
        as_path(text)


def test_names_of_datasets_call_directories_and_lead_nowhere():
    for name in ("", ".", "..", ".x", "a/b", "/", "a\\b", "a\0", "a\nb", "\ud800", "x" * 201, 3, None):
        with pytest.raises(UserError, match="can name a directory"):
            check_name(name, "here")
    for name in ("report.html", "configs", "Scores.JSON", "a.npz", "checkpoints"):
        assert check_name(name, "here") == name
        with pytest.raises(UserError, match="as results are called"):
            check_name(name, "here", alone=False)
    for name in ("dolly", "a.b", "$x^{$", "漢字", "a b"):
        assert check_name(name, "here", alone=False) == name


def test_identity_of_a_row_is_its_content():
    assert sample_id({"a": 1, "b": "é"}) == sample_id({"b": "é", "a": 1})
    assert sample_id({"a": 1}) != sample_id({"a": "1"})


def test_words_of_errors():
    assert did_you_mean("analyse", ["analyze", "select"]) == " (did you mean 'analyze'?)"
    assert did_you_mean("xyz", ["analyze"]) == ""
    assert listed(range(3)) == "0, 1, 2" and listed(range(10), 2) == "0, 1 and 8 more"


def test_lines_are_read_one_by_one(tmp_path):
    """Of a file of a terabyte no more than a line."""
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="line 1: expected at most 32 MiB"):
        read_lines(tmp_path / "sparse")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_lines(tmp_path)


def test_messages_that_quote_pages_are_cut():
    text = str(UserError(f"file: expected {'x' * 10**6}; write it again"))
    assert len(text) < 2100 and text.startswith("file: expected xxx") and text.endswith("xxx; write it again")
