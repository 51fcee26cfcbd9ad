"""Damage to files: bytes of any format, and what a format's own structure can say that it should not.

`damaged` takes the files of a valid input and a source of chance and gives others: the same chance,
the same files.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

Files = dict[str, bytes]
NUMBERS = (0, -1, 1, 2, 3, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 10**12, 10**400)
FLOATS = (0.0, -0.0, -1.0, 0.5, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"))
TEXTS = (
    "", " ", "\0", "a\0b", "\n", "\x1b]0;x\x07", "\ud800", "\udcff", "../../x", "/etc/passwd", "~nobody-here/x", "{}",
    "x" * 300, "x" * 70_000, "é", "漢字", "\u202e", "(a+)+$", "(((", "[", "9" * 5000, "NaN", "-1", "true", "null", "²",
    "layer_99999999999", "layer_0x", "meta", "hidden", "$x^{", "%s%n", "{{ 1/0 }}", "\ufeff", "\u2028",
    "a" * 255 + "/b",
)  # fmt: skip
SNIPPETS = (
    b"\0", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n\n", b'"', b"'", b",", b"{", b"[" * 2000, b"]", b"1e999",
    b"-", b"NaN", b"\xed\xa0\x80", b"\\ud800", b"9" * 5000, b"{{", b"{% for x in range(10**9) %}", b"{% endfor %}",
    b"#", b"=", b"\t", b"\x1a", b"\xc0\x80", b"\xf4\x90\x80\x80", b'{"a":' * 100,
)  # fmt: skip


# What may stand in the place of a file, beside other bytes.
PLACES = ("a pipe", "a device", "a directory", "a terabyte of zeros", "a link to itself")


def put(file: Path, content: bytes | str) -> None:
    """Makes a file of this content, or one of `PLACES`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content == "a pipe":
        os.mkfifo(file)
    elif content == "a device":
        file.symlink_to("/dev/zero")
    elif content == "a directory":
        file.mkdir()
    elif content == "a link to itself":
        file.symlink_to(file.name)
    else:
        with file.open("wb") as opened:
            opened.truncate(2**40)


def damaged(files: Files, chance: Random) -> Files:
    """The files with one of them changed, or absent."""
    name = chance.choice(sorted(files))
    content, inner = files[name], name.removesuffix(".part")
    suffix = inner.rpartition(".")[2].lower()
    ways: list[Callable[[bytes, Random], bytes]] = [_bytes, *[_BY_SUFFIX.get(suffix, _bytes)] * 4]
    if chance.random() < 0.01 and len(files) > 1:
        return {other: one for other, one in files.items() if other != name}
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        try:
            content = chance.choice(ways)(content, chance)
        except Exception:  # damaged already, beyond what its structure can be told from
            content = _bytes(content, chance)
    return {**files, name: content}


def _bytes(content: bytes, chance: Random) -> bytes:
    how = chance.randrange(9)
    place = chance.randrange(len(content) + 1)
    if how == 0:
        return bytes(chance.randrange(256) for _ in range(chance.choice((0, 1, 2, 7, 64))))
    if how == 1:
        return content[:place]
    if how == 2:
        return content[:place] + chance.choice(SNIPPETS) + content[place:]
    if how == 3:
        number = chance.choice(NUMBERS) & (2**64 - 1)
        width = chance.choice((1, 2, 4, 8))
        place = min(place, chance.choice((len(content), 64, 1024)))  # sizes stand at the beginning
        return content[:place] + (number & (2 ** (8 * width) - 1)).to_bytes(width, "little") + content[place + width :]
    if how == 4:
        return content[:place] + content[place + chance.choice((1, 2, 8, 100)) :]
    if how == 5:
        return content + chance.choice((content, b"\0" * 8, b"\n"))
    if how == 6:
        return (
            content[:place] + bytes(min(len(content) - place, chance.choice((1, 16, 4096)))) + content[place + 4096 :]
        )
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        if changed:
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def value(chance: Random, depth: int = 0) -> Any:
    """Any JSON value, rather a strange one."""
    how = chance.randrange(9 if depth < 3 else 6)
    if how == 0:
        return chance.choice((None, True, False))
    if how in (1, 2):
        return chance.choice(NUMBERS)
    if how == 3:
        return chance.choice(FLOATS)
    if how in (4, 5):
        return chance.choice(TEXTS)
    if how == 6:
        return [value(chance, depth + 1) for _ in range(chance.choice((0, 1, 2, 5)))]
    if how == 7:
        return {chance.choice(TEXTS): value(chance, depth + 1) for _ in range(chance.choice((0, 1, 2)))}
    deep: Any = 0
    for _ in range(chance.choice((3, 70, 300))):
        deep = [deep] if chance.random() < 0.5 else {"a": deep}
    return deep


def _places(found: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = list(found.items())[:200] if isinstance(found, dict) else []
    inner = list(enumerate(found[:20])) if isinstance(found, list) else inner
    below = inner if len(path) < 12 else []
    return [path, *(place for key, one in below for place in _places(one, (*path, key)))]


def changed_json(found: Any, chance: Random) -> Any:
    """A JSON value with another in one place, or without what was there, or with it elsewhere."""
    place = chance.choice(_places(found))
    if not place:
        return value(chance)
    found = json.loads(json.dumps(found)) if chance.random() < 0.5 else found
    holder = found
    for key in place[:-1]:
        holder = holder[key]
    last, how = place[-1], chance.randrange(8)
    if how == 0:
        del holder[last]
    elif how == 1 and isinstance(holder, dict):
        holder[chance.choice(TEXTS)] = holder.pop(last)
    elif how == 1:
        holder.append(holder[last])
    elif how == 2:
        other = chance.choice(_places(found))
        moved = found
        for key in other:
            moved = moved[key]
        holder[last] = json.loads(json.dumps(moved))
    elif how == 3:
        holder[last] = [holder[last]] if chance.random() < 0.5 else {"a": holder[last]}
    elif how == 4 and isinstance(holder[last], int | float) and not isinstance(holder[last], bool):
        holder[last] = chance.choice(
            (holder[last] + 1, -holder[last], holder[last] * 1000, float(holder[last]), 10**30)
        )
    elif how == 4 and isinstance(holder[last], str):
        holder[last] = chance.choice((holder[last][1:], holder[last] * 2, holder[last].upper(), holder[last] + "\0"))
    else:
        holder[last] = value(chance)
    return found


def _text(found: Any, chance: Random) -> bytes:
    ascii_only = chance.random() < 0.7
    return json.dumps(found, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


def _json(content: bytes, chance: Random) -> bytes:
    text = _text(changed_json(json.loads(content), chance), chance)
    if chance.random() < 0.05 and text.startswith(b"{") and len(text) > 2:
        return b"{" + text[1:-1] + b"," + text[1:-1] + b"}"  # every key twice
    return text


def _lines(content: bytes, chance: Random) -> bytes:
    lines = content.splitlines()
    place, how = chance.randrange(len(lines)), chance.randrange(6)
    if how == 0:
        lines[place : place + 1] = [lines[place]] * chance.choice((0, 2, 3))
    elif how == 1:
        lines[place] = _bytes(lines[place], chance)
    else:
        lines[place] = _json(lines[place], chance)
    return b"\n".join(lines) + b"\n" * chance.choice((0, 1, 1, 1, 2))


def _snippets(content: bytes, chance: Random) -> bytes:
    place = chance.randrange(len(content) + 1)
    if chance.random() < 0.3:
        return content[:place] + content[place + chance.randrange(1, 40) :]
    return (
        content[:place]
        + chance.choice((*SNIPPETS, *(one.encode("utf-8", "surrogatepass") for one in TEXTS)))
        + content[place:]
    )


def _array(found: np.ndarray, chance: Random) -> np.ndarray | bytes:
    """Another array, or the bytes of one whose header lies."""
    how = chance.randrange(12)
    if how == 0:
        return found.astype(chance.choice(("<f8", "<f2", ">f4", "<i8", "u1", "?", "c8", "U4", "S3")), copy=True)
    if how == 1:
        return found[..., :-1] if found.ndim else found
    if how == 2:
        return found[None] if chance.random() < 0.5 else found.reshape(-1)
    if how == 3:
        return found[:0] if found.ndim else found
    if how == 4:
        return (
            np.array(value(chance, 3), dtype=object)
            if chance.random() < 0.3
            else np.zeros(chance.choice(((), (1,), (0, 3), (2, 2, 2))))
        )
    if how == 5 and found.dtype.kind == "f" and found.size:
        spoiled = found.copy()
        spoiled.reshape(-1)[chance.randrange(found.size)] = chance.choice((np.nan, np.inf, -np.inf, 3e38, 0))
        return spoiled
    if how == 6 and found.dtype.kind == "f":
        return np.full_like(found, chance.choice((0, 1, np.nan, 1e30)))
    if how == 7 and found.dtype.kind in "iu" and found.size:
        spoiled = found.copy()
        spoiled.reshape(-1)[chance.randrange(found.size)] = chance.choice((-1, 0, 2**31 - 1, -(2**31)))
        return spoiled
    if how == 8 and found.dtype.kind == "U" and found.size and found.ndim:
        spoiled = found.copy()
        spoiled.reshape(-1)[chance.randrange(found.size)] = found.reshape(-1)[0]
        return spoiled
    if how == 9:
        return np.asfortranarray(found)
    if found.dtype.kind == "U" and not found.ndim:
        try:
            return np.array(_json(str(found).encode(), chance).decode("utf-8", "surrogatepass"))
        except ValueError:
            return np.array("{")
    shape = chance.choice(((10**12,), (2**31, 2**31), (-1,), (2**63,), (1,) * 40, (0, 10**12), ()))
    head = repr(
        {
            "descr": chance.choice(("<f8", "<f4", "|O", "<U0", "|V0", "<U100000000", "<M8[s]")),
            "fortran_order": False,
            "shape": shape,
        }
    )
    return _npy(head.encode() + b"\n") + found.tobytes()[:64]


def _npy(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) % 2**16) + header


def _saved(array: np.ndarray | bytes) -> bytes:
    if isinstance(array, bytes):
        return array
    held = io.BytesIO()
    np.save(held, array, allow_pickle=True)
    return held.getvalue()


def _npz(content: bytes, chance: Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        held: dict[str, bytes] = {member.filename: archive.read(member) for member in archive.infolist()}
    name, how = chance.choice(sorted(held)), chance.randrange(12)
    if how == 0:
        del held[name]
    elif how == 1:
        held[chance.choice(TEXTS).replace("\0", "") + chance.choice((".npy", ""))] = held.pop(name)
    elif how == 2:
        held["strange.npy"] = _saved(np.zeros(chance.choice((0, 3))))
    elif how == 3:
        held[name] = held[chance.choice(sorted(held))]
    elif how == 4:
        held[name] = _bytes(held[name], chance)
    else:
        held[name] = _saved(_array(_loaded(held[name]), chance))
    packed = chance.choice((zipfile.ZIP_STORED,) * 8 + (zipfile.ZIP_DEFLATED,))
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", packed) as archive:
        for other, one in held.items():
            archive.writestr(other.encode("utf-8", "replace").decode(), one)
        if chance.random() < 0.02:
            archive.writestr(zipfile.ZipInfo("bomb.npy"), bytes(10**7), zipfile.ZIP_DEFLATED)
    return made.getvalue()


def _npy_file(content: bytes, chance: Random) -> bytes:
    return _saved(_array(_loaded(content), chance))


def _loaded(content: bytes) -> np.ndarray:
    """An array; not one whose header says that it has no end of empty elements."""
    found = np.load(io.BytesIO(content), allow_pickle=False)
    if found.size > 10**6:
        raise ValueError
    return found


def _safetensors(content: bytes, chance: Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    inside = header.get("__metadata__", {}).get("jaxcrit")
    if inside and chance.random() < 0.6:
        header["__metadata__"]["jaxcrit"] = _json(inside.encode(), chance).decode("utf-8", "replace")
        text = json.dumps(header).encode()
    elif chance.random() < 0.2:
        text, data = json.dumps(header).encode(), _bytes(data, chance)
    else:
        text = _json(json.dumps(header).encode(), chance)
    said = len(text) if chance.random() < 0.9 else chance.choice(NUMBERS) % 2**64
    return said.to_bytes(8, "little") + text + data


_GGUF = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


def _gguf(content: bytes, chance: Random) -> bytes:
    """Changes a value of the metadata or of a tensor's description, where it stands."""
    at, places = 24, [(8, "Q"), (16, "Q"), (4, "I")]

    def string(at: int) -> int:
        places.append((at, "Q"))
        size = int.from_bytes(content[at : at + 8], "little")
        places.append((at + 8, f"{size}s"))
        return at + 8 + size

    tensors, keys = struct.unpack("<QQ", content[8:24])
    for _ in range(keys):
        at = string(at)
        kind = int.from_bytes(content[at : at + 4], "little")
        places.append((at, "I"))
        at += 4
        if kind == 8:
            at = string(at)
        elif kind == 9:
            inner, count = struct.unpack("<IQ", content[at : at + 12])
            places += [(at, "I"), (at + 4, "Q")]
            at += 12
            for _ in range(count):
                at = string(at) if inner == 8 else at + struct.calcsize(_GGUF[inner])
        else:
            places.append((at, _GGUF[kind]))
            at += struct.calcsize(_GGUF[kind])
    places = places[:3] + [one for one in places[3:] if chance.random() < 0.05]  # a vocabulary is most of them
    for _ in range(tensors):
        at = string(at)
        axes = int.from_bytes(content[at : at + 4], "little")
        places += [(at, "I"), *((at + 4 + 8 * axis, "Q") for axis in range(axes))]
        at += 4 + 8 * axes
        places += [(at, "I"), (at + 4, "Q")]
        at += 12
    place, form = chance.choice(places)
    size = struct.calcsize(f"<{form}")
    if form[-1] == "s":
        text = chance.choice(TEXTS).encode("utf-8", "surrogatepass")
        longer = len(text).to_bytes(8, "little") + text
        return content[: place - 8] + longer + content[place + size :]
    if form in "fd":
        number = struct.pack(f"<{form}", chance.choice((0.0, -1.0, float("nan"), float("inf"), 1e30)))
    else:
        number = (chance.choice(NUMBERS) % 256**size).to_bytes(size, "little")
    return content[:place] + number + content[place + size :]


def _packed(pack: Callable[[bytes], bytes], unpack: Callable[[bytes], bytes]) -> Callable[[bytes, Random], bytes]:
    def change(content: bytes, chance: Random) -> bytes:
        if chance.random() < 0.3:
            return _bytes(content, chance)
        return pack(_lines(unpack(content), chance))

    return change


_BY_SUFFIX: dict[str, Callable[[bytes, Random], bytes]] = {
    "json": _json,
    "jsonl": _lines,
    "metadata": _json,
    "npz": _npz,
    "npy": _npy_file,
    "safetensors": _safetensors,
    "gguf": _gguf,
    **dict.fromkeys(("csv", "tsv", "txt", "jinja", "toml", "flags"), _snippets),
    "gz": _packed(gzip.compress, gzip.decompress),
    "bz2": _packed(bz2.compress, bz2.decompress),
    "xz": _packed(lzma.compress, lzma.decompress),
}
