"""Hidden states in files: jaxcrit's own, arrays of numpy or safetensors, and vLLM's directories of a file per prompt.

What a file does not say is asked for. Sizes are checked before memory is taken, and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import ml_dtypes  # noqa: F401  (with it numpy knows bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxcrit.core import digests
from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.files import FORMAT_VERSION, atomic_path, check_name, local_path
from jaxcrit.core.groups import AXES
from jaxcrit.core.hashing import sample_id
from jaxcrit.core.reading import Stored, fitting, members, parse_json, plain_size, safetensors_header, stored_npy
from jaxcrit.core.rundir import read_record
from jaxcrit.core.schema import conform
from jaxcrit.evidence.states import HiddenStates, states_from

OWN = "activations.safetensors"
_FORMAT = "jaxcrit.activations"
_BESIDE = ("sample_ids", "units", "embed", "meta")  # what may lie beside the states
_VLLM = {"hidden_states", "token_ids"}
_KINDS = f"{OWN}, an npy, npz or safetensors file, or a directory that vLLM wrote"


def write_states(path: Path, states: HiddenStates, embed: Any = None) -> None:
    """Writes ``activations.safetensors``, which says itself what it holds; same states, same bytes.

    Args:
        path: file to write.
        states: states of all layers.
        embed: ``[N, D]`` embedding output, or None.
    """
    arrays = {"hidden": np.asarray(states.hidden)}
    if embed is not None:
        arrays["embed"] = np.asarray(embed)
    if states.units is not None:
        arrays["units"] = states.units.astype(np.int32)
    facts = {"name": states.name, "dtype": states.dtype, "normed": states.normed, "meta": dict(states.meta)}
    content = {**facts, "prompt_ids": states.prompt_ids}
    # One entry, for safetensors writes several in any order.
    text = json.dumps({"format": _FORMAT, "format_version": FORMAT_VERSION, **content}, sort_keys=True)
    with atomic_path(path) as temporary:
        save_file(arrays, temporary, {"jaxcrit": text})


def read_all(text: str, **options: Any) -> list[HiddenStates]:
    """States of several files or directories, named with commas, or of a run of several datasets.

    Args:
        text: as ``--states`` has it.
        **options: options of `read_states`.

    Raises:
        UserError: one cannot be read, or two have one name.
    """
    parts: list[Path] = []
    for part in text.split(","):
        folder = local_path(part.strip(), "states")
        kept = {file.parent.name: file for file in folder.glob(f"*/{OWN}")}
        order = read_record(folder).get("data", ()) if kept else ()
        parts += [kept[name] for name in order if name in kept] or [folder]
    found = [read_states(part, **options) for part in parts]
    names = [one.name for one in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--states={text}: expected different names, got {twice[0]!r} twice; rename one")
    return found


def read_states(
    given: str | Path, *, axes: str = "", ends: str = "", position: str = "last", limit: int = 0, **facts: Any
) -> HiddenStates:
    """Reads the hidden states of one dataset.

    Args:
        given: ``activations.safetensors`` or the run that holds it; an npy, npz or safetensors file with one array of
            three axes, called ``hidden`` where there are several, and beside it ``sample_ids`` and ``units`` where it
            has them; or a directory of vLLM's, a file per prompt.
        axes: ``lnd`` or ``nld``; empty where the file says so itself.
        ends: what the layers are, see `states_from`; empty where the file says so itself.
        position: token that stands for a prompt, where a file holds all of them: ``last``, ``mean`` or ``all``.
        limit: prompts to read at most, the first ones; 0 for all.
        **facts: ``sample_ids``, ``units`` and ``model_hash`` where the caller knows them; see `states_from`.

    Raises:
        UserError: no such file, one of another kind, damaged, too large, or one that does not say what it holds.
    """
    path = local_path(given, "states")
    if path.is_dir() and (path / OWN).is_file():
        path = path / OWN
    if not path.exists():
        raise UserError(f"{path}: no such file; expected {_KINDS}")
    name = path.resolve().name if path.is_dir() else path.stem
    facts = {"name": name, "source": str(path), **{key: value for key, value in facts.items() if value is not None}}
    if path.is_dir():
        try:
            return _of_vllm(path, axes, ends, position, limit, facts)
        except UserError as error:
            raise (error if str(error).startswith(str(path)) else UserError(f"{path}: {error}")) from None
    with _opened(path) as arrays:
        if position != "last":
            raise UserError(f"--position={position}: is for files that hold every token, as vLLM's do; leave it out")
        found, said = _of_arrays(arrays, path.name == OWN, axes, ends, facts), bool(arrays.said)
    with path.open("rb") as file:
        digests.check(path, file, _FORMAT if said else "")
    return found.first(limit) if limit else found


class _Arrays(dict[str, Stored]):
    """Arrays of a file by name.

    Attributes:
        said: what the file says of itself; empty of all but jaxcrit's own.
    """

    said: Mapping[str, Any] = {}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Arrays]:
    """The arrays of a file, whose first bytes say of what kind it is; errors while it is open name it."""
    found = _Arrays()
    plain_size(path, _KINDS)
    try:
        with path.open("rb") as file, contextlib.ExitStack() as opened:
            begin = file.read(6)
            if begin == b"\x93NUMPY":
                found["hidden"] = stored_npy(file, path.stat().st_size)
            elif begin[:4] == b"PK\x03\x04":
                archive = opened.enter_context(zipfile.ZipFile(file))
                for name, member in members(archive).items():
                    found[name] = stored_npy(opened.enter_context(archive.open(member)), member.file_size)
            else:
                safetensors_header(path)
                tensors = opened.enter_context(safe_open(path, framework="numpy"))
                for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                    read = functools.partial(tensors.get_slice, name)
                    found[name] = Stored(read().get_shape(), read)
                said = parse_json((tensors.metadata() or {}).get("jaxcrit", "{}"), "what it says of itself")
                found.said = conform(said, dict[str, Any], "what it says of itself")
            yield found
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (OSError, EOFError, ValueError, RecursionError, zipfile.BadZipFile, zlib.error, SafetensorError) as error:
        raise UserError(f"{path}: expected {_KINDS}; got something else, or a damaged one ({error})") from None


def _of_arrays(arrays: _Arrays, own: bool, axes: str, ends: str, facts: dict[str, Any]) -> HiddenStates:
    """States from one array of a file, and what lies beside it."""
    said = arrays.said
    names = [name for name in arrays if name not in _BESIDE]
    if set(arrays) == _VLLM:
        raise UserError("holds one prompt, as vLLM writes it; give the directory of all of them")
    if "hidden" not in arrays and len(names) != 1:
        raise UserError(f"expected one array of hidden states, or one called hidden; got {listed(sorted(arrays))}")
    stored = arrays["hidden" if "hidden" in arrays else names[0]]
    fitting(stored.shape)
    beside = {name: _beside(arrays, name) for name in ("sample_ids", "units") if name in arrays}
    facts = {**beside, **facts}
    if said or (own and "hidden" in arrays):
        own_ends = "normed" if said.get("normed") is True else "blocks"
        for flag, asked, is_so in (("axes", axes, AXES[0]), ("ends", ends, own_ends)):
            if asked not in ("", is_so):
                raise UserError(f"--{flag}={asked}: the file is jaxcrit's own, whose {flag} are {is_so}; leave it out")
        axes, ends = AXES[0], own_ends
        facts |= _own_facts(said, facts.get("units", range(stored.shape[1]))) if said else {}
    if not axes or not ends:
        raise UserError(
            "does not say what it holds; give --axes=lnd (layers first) or nld (samples first), and"
            " --ends=blocks, embed (the embedding output in front), normed (at the end what leaves the final norm), or"
            " embed,normed, as output_hidden_states of transformers is"
        )
    return states_from(np.asarray(stored.read()[...]), axes=axes, ends=ends, **facts)


def _beside(arrays: _Arrays, name: str) -> list[Any]:
    """A value of each sample, that stands beside the states."""
    if len(arrays[name].shape) != 1:
        raise UserError(f"expected {name} to be [samples], got shape {list(arrays[name].shape)}")
    found = np.asarray(arrays[name].read()[...])
    if name == "units" and found.dtype.kind not in "iu":
        raise UserError(f"expected units to be whole numbers, got {found.dtype}")
    return found.tolist()


class SaidMeta(TypedDict, total=False):
    """How states were captured, as ``activations.safetensors`` has it."""

    model_hash: str | None
    model_type: str | None
    template_hash: str
    position: Literal["last", "mean", "all"]


class Said(TypedDict):
    """What ``activations.safetensors`` says of itself."""

    format: str
    format_version: int
    name: str
    prompt_ids: list[str]
    meta: SaidMeta
    dtype: str
    normed: bool


def _own_facts(said: Mapping[str, Any], units: Sequence[int]) -> dict[str, Any]:
    """What ``activations.safetensors`` says of itself, as fields of `HiddenStates`."""
    again = "write it again with jaxcrit analyze"
    conform(said, Said, "what it says of itself is damaged", again)
    version, name, ids = (said["format"], said["format_version"]), said["name"], said["prompt_ids"]
    if version != (_FORMAT, FORMAT_VERSION) or re.search(r"[/\\]|^\.*$", name):
        expected = f"{_FORMAT} {FORMAT_VERSION} of a plain name"
        raise UserError(f"expected {expected}, got {version} of {name!r}; upgrade jaxcrit, or write it again")
    check_name(name, "what it says of itself")
    try:
        facts = {"meta": dict(said["meta"]), "dtype": said["dtype"], "sample_ids": [ids[unit] for unit in units]}
    except (IndexError, TypeError) as error:
        raise UserError(f"what it says of itself is damaged ({error}); {again}") from None
    return {"name": name, **facts}


def _of_vllm(folder: Path, axes: str, ends: str, position: str, limit: int, facts: dict[str, Any]) -> HiddenStates:
    """States from ``REQUEST.safetensors`` of every prompt, as vLLM's connector for hidden states writes them.

    Of vllm-project/vllm, at the commits named: ``hidden_states`` is [tokens, layers, width] beside ``token_ids``
    [tokens], with ``.lock`` files left behind (example_hidden_states_connector.py at 015a95c8bdd8); the first version
    wrote [layers, tokens, width] (806715ec00d5). Layer id k of ``eagle_aux_hidden_state_layer_ids`` is what leaves
    block k - 1; 0 is the embedding output, the number of blocks what leaves the last one, before the final norm
    (docs/features/speculative_decoding/extract_hidden_states.md at 0aafea4e1e11). The ids are not in the file; layers
    come in the order in which the model runs them.
    """
    entries = sorted(folder.iterdir(), key=_by_number)
    files = [file for file in entries if file.suffix == ".safetensors"][: limit or None]
    others = [file.name for file in entries if file.suffix not in (".safetensors", ".lock")]
    if others or not files:
        got = listed(others) if others else "none"
        raise UserError(f"expected {OWN}, or a .safetensors file of vLLM's for each prompt and nothing else; got {got}")
    prompts: dict[str, tuple[Path, np.ndarray]] = {}
    shapes = []
    for file in files:
        with _opened(file) as arrays:
            tokens, stored = _prompt(arrays)
            identity = sample_id({"token_ids": tokens.tolist()})
            if identity in prompts:
                raise UserError(f"holds the same prompt as {prompts[identity][0].name}; remove one of them")
            prompts[identity] = file, tokens
            shapes.append(stored.shape)
    counts = [len(tokens) for _, tokens in prompts.values()]
    fits = {order: [shape[order.index("n")] for shape in shapes] == counts for order in AXES if axes in ("", order)}
    if not any(fits.values()):
        raise UserError(f"expected as many states as token ids along one axis{f' of {axes}' if axes else ''}")
    if all(fits.values()) and not axes:
        raise UserError(
            "prompts are all as long as there are layers; give --axes=nld (tokens first), or lnd (layers"
            " first, as vLLM's first versions wrote)"
        )
    order = next(order for order in fits if fits[order])
    sizes = {(shape[order.index("l")], shape[2]) for shape in shapes}
    if len(sizes) > 1:
        raise UserError(f"expected one number of layers and width in all files, got {listed(sorted(sizes))}")
    layers, width = sizes.pop()
    notes = ["vLLM's files do not name their layers, which are taken for all blocks; --model=DIR checks their number"]
    if not ends:
        ends = _first_of(prompts.values(), order)
        if ends == "embed":
            notes.append("the first states of a token are the same wherever it stands: the embedding output, left out")
    taken = counts if position == "all" else [1] * len(counts)
    fitting((layers, sum(taken), width))
    hidden, dtypes, begin = np.empty((layers, sum(taken), width), np.float32), set(), 0
    for (file, tokens), count in zip(prompts.values(), taken, strict=True):
        with _opened(file) as arrays:
            part = _tokens(arrays, order, slice(len(tokens) - 1, None) if position == "last" else slice(None))
            dtypes.add(str(part.dtype))
            part = part.astype(np.float32)
            hidden[:, begin : begin + count] = part.mean(axis=1, keepdims=True) if position == "mean" else part
            begin += count
    units, kept = np.repeat(np.arange(len(counts)), taken), " and ".join(sorted(dtypes))
    named: dict[str, Any] = {
        "sample_ids": np.array(list(prompts))[units],
        "units": units if position == "all" else None,
    }
    named |= {"meta": {"position": position}, "dtype": kept, "notes": notes}
    return states_from(hidden, axes="lnd", ends=ends, **{**named, **facts})


def _prompt(arrays: _Arrays) -> tuple[np.ndarray, Stored]:
    """Token ids ``[T]`` and states of one file of vLLM's."""
    if set(arrays) != _VLLM:
        raise UserError(f"expected hidden_states and token_ids, as vLLM writes them; got {listed(sorted(arrays))}")
    tokens, stored = np.asarray(arrays["token_ids"].read()[...]), arrays["hidden_states"]
    if tokens.ndim != 1 or not len(tokens) or len(stored.shape) != 3:
        raise UserError(
            f"expected token ids [tokens] and states of three axes, got shapes {tokens.shape} and {stored.shape}"
        )
    return tokens, stored


def _tokens(arrays: _Arrays, order: str, which: slice) -> np.ndarray:
    """States of some tokens of one file, ``[L, T, D]``; other bytes are not read."""
    part = arrays["hidden_states"].read()
    return part[which].swapaxes(0, 1) if order == "nld" else part[:, which]


def _first_of(prompts: Iterable[tuple[Path, np.ndarray]], order: str) -> str:
    """Whether the first states are those of the embedding: ``embed`` or ``blocks``.

    The embedding of a token is the same wherever it stands; what leaves a block is not. (Not so where positions are
    embedded too; no model of such a family is among those that vLLM writes states of.)
    """
    for file, tokens in prompts:
        for token in np.unique(tokens)[::-1]:
            places = np.flatnonzero(tokens == token)[-2:]
            if len(places) == 2:
                with _opened(file) as arrays:
                    a, b = (_tokens(arrays, order, slice(place, place + 1))[:2] for place in places.tolist())
                same = (a == b).all(axis=(1, 2))
                if not same[-1]:
                    return "embed" if same[0] and len(same) > 1 else "blocks"
    raise UserError(
        "no token stands twice in a prompt, by which the embedding output could be told; give --ends=blocks, or embed"
        " if eagle_aux_hidden_state_layer_ids begins with 0"
    )


def _by_number(file: Path) -> list[Any]:
    """Sorts 2 before 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", file.name)]
