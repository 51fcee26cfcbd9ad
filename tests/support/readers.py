"""Every reader of files that others may have written, in one table: a valid input, and how it is read.

A new format is a row here; `tests/test_hostile.py` finds readers that have none.
"""

from __future__ import annotations

import bz2
import dataclasses
import functools
import gzip
import json
import lzma
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Union, get_args, get_origin, is_typeddict
from unittest import mock

import numpy as np

from support.damage import Files
from support.tiny import CHAT_TEMPLATE


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader.

    Attributes:
        name: name in the table.
        make: writes a valid input to a folder.
        read: reads it.
        damaged: files of the input that are damaged; empty for all.
        share: how many inputs of the others' number; slow ones take fewer.
    """

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    damaged: tuple[str, ...] = ()
    share: float = 1.0

    def files(self) -> tuple[Files, Files]:
        """The valid input: the files to damage, and those beside them."""
        with tempfile.TemporaryDirectory() as scratch:
            self.make(Path(scratch))
            every = {
                str(one.relative_to(scratch)): one.read_bytes() for one in Path(scratch).rglob("*") if one.is_file()
            }
        mine = {name: content for name, content in every.items() if not self.damaged or name in self.damaged}
        return mine, {name: content for name, content in every.items() if name not in mine}


def example(kind: Any) -> Any:
    """A value of a declared kind, see `jaxcrit.core.schema`."""
    from jaxcrit.core.schema import _hints

    origin, parts = get_origin(kind), get_args(kind)
    if is_typeddict(kind):
        return {name: example(hint) for name, hint in _hints(kind).items()}
    if hasattr(kind, "__metadata__"):
        lowest = kind.__metadata__[0].lowest
        return parts[0](max(1, lowest if np.isfinite(lowest) else 1))
    if origin in (list, dict):
        return [example(parts[0])] if origin is list else {"1": example(parts[1])}
    if origin is Literal:
        return parts[0]
    if origin is Union or type(kind).__name__ == "UnionType":
        return example(parts[0])
    return {str: "a text", int: 1, float: 0.5, bool: True, Any: 1, type(None): None}[kind]


def _written(name: str, content: Any) -> Callable[[Path], object]:
    """Writes one file: text, bytes, or JSON of anything else."""

    def make(folder: Path) -> None:
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)

    return make


def _ours(name: str, form: str, kind: Any, **other: Any) -> Callable[[Path], object]:
    """Writes an example of a format of jaxcrit's."""
    from jaxcrit.core.files import write_json

    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_json(folder / name, form, {**example(kind), **other})

    return make


def _npz(name: str, form: str, arrays: Mapping[str, Any], **meta: Any) -> Callable[[Path], object]:
    from jaxcrit.core.files import write_npz

    said = {"format": form, "format_version": 1, **meta}
    return lambda folder: write_npz(folder / name, {key: np.asarray(one) for key, one in arrays.items()}, said)


def _several(*makes: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [make(folder) for make in makes]


@functools.cache
def _tiny() -> Path:
    """A checkpoint that stays as it is."""
    from support.tiny_model import tiny_checkpoint

    return tiny_checkpoint(Path(tempfile.mkdtemp()) / "tiny", num_hidden_layers=2)


def _copy_tiny(folder: Path) -> None:
    shutil.copytree(_tiny(), folder, dirs_exist_ok=True)


@functools.cache
def _tokenizer() -> Any:
    from jaxcrit.data.tokenizer import load_tokenizer

    return load_tokenizer(_tiny())


@functools.cache
def _config() -> Any:
    from jaxcrit.models.checkpoint import open_checkpoint

    return open_checkpoint(_tiny()).config


def _from_hf(folder: Path) -> Any:
    from jaxcrit.models.shapes import config_of

    return config_of(str(folder))


def _config_of(case: str) -> Reader:
    from support.family_models import raw_config

    return Reader(f"config.json, {case}", _written("config.json", raw_config(case)), _from_hf)


def _checkpoint(folder: Path) -> Any:
    from jaxcrit.models.checkpoint import model_hash, open_checkpoint

    return model_hash(open_checkpoint(folder))


def _sharded(folder: Path) -> None:
    _copy_tiny(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    from safetensors import safe_open

    with safe_open(folder / "model-00001-of-00001.safetensors", framework="numpy") as held:
        names = dict.fromkeys(held.keys(), "model-00001-of-00001.safetensors")
    _written("model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": names})(folder)


def _read_digests(folder: Path) -> Any:
    """The cache of digests, in the place where it would be of a file that stays as it is."""
    from jaxcrit.models.checkpoint import kept_digests

    file, names = _tiny() / "model.safetensors", ["a"]
    with _cache(folder) as cache:
        kept_digests(file, names, lambda name: ["F32", [1], "0" * 64])
        kept = next((cache / "digests").iterdir())
        kept.unlink()
        (folder / "digests.json").replace(kept)
        found = kept_digests(file, names, lambda name: ["F32", [1], "0" * 64])
        shutil.rmtree(cache)
    assert found.keys() == {"a"} and len(found["a"][2]) == 64
    return found


class _cache:
    """A cache directory below a folder, while this is open."""

    def __init__(self, folder: Path) -> None:
        self.path, self.before = folder / "cache", os.environ.get("JAXCRIT_CACHE", "")

    def __enter__(self) -> Path:
        os.environ["JAXCRIT_CACHE"] = str(self.path)
        return self.path

    def __exit__(self, *_: object) -> None:
        os.environ["JAXCRIT_CACHE"] = self.before
        shutil.rmtree(self.path, ignore_errors=True)


def _stops(folder: Path) -> Any:
    from jaxcrit.models.stops import _generation

    return _generation(SimpleNamespace(checkpoint=SimpleNamespace(path=folder)))  # type: ignore[arg-type]


def _make_adapter(folder: Path) -> None:
    from safetensors.numpy import save_file

    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    more = {"base_model_name_or_path": "base", "rank_pattern": {"nothing": 3}, "alpha_pattern": {}, "use_rslora": False}
    _written("adapter_config.json", {**settings, **more})(folder)
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {"A": (2, 24), "B": (24, 2)}
    given = {name.format(layer, end): np.ones(shape, np.float32) for layer in range(2) for end, shape in shapes.items()}
    save_file(given, folder / "adapter_model.safetensors")


def _adapter(folder: Path) -> Any:
    from jaxcrit.models.adapters import Place, read_adapter
    from support.family_models import one_device

    return read_adapter(Place(_tiny(), _tiny(), folder, "adapter"), _config(), one_device())


def _make_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(_tiny() / name, folder / name)
    _written("config.json", {"model_type": "llama"})(folder)


def _load_tokenizer(folder: Path) -> Any:
    from jaxcrit.data.chat import chat_of
    from jaxcrit.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(folder)
    return chat_of(loaded, "none"), loaded.eos_token_id


def _template(folder: Path) -> Any:
    from jaxcrit.data.chat import chat_of

    chat = chat_of(_tokenizer(), f"chat:{folder / 'template.jinja'}")
    assert chat is not None
    return chat.prompt([{"role": "user", "content": "one"}], "row 1"), chat.turn


def _make_gguf(folder: Path) -> None:
    from support.gguf_files import write_gguf

    write_gguf(folder / "model.gguf", "llama")


def _gguf(folder: Path) -> Any:
    from jaxcrit.models.gguf import open_gguf

    found = open_gguf(folder / "model.gguf")
    return found.digests(), [found.read(name, slice(0, 1), None) for name in sorted(found.shards)[:2]]


def _gguf_tokenizer(folder: Path) -> Any:
    from jaxcrit.data.gguf import gguf_tokenizer

    return gguf_tokenizer(folder / "model.gguf")(["hello"])


def _hidden(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((3, 6, 4)).astype(np.float32)


def _states(name: str, **options: Any) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        from jaxcrit.evidence.states_files import read_all

        return read_all(str(folder / name), **options)

    return read


def _make_own_states(folder: Path) -> None:
    from jaxcrit.evidence.states import states_from
    from jaxcrit.evidence.states_files import write_states

    found = states_from(_hidden(), axes="lnd", ends="blocks", name="rows", source="rows")
    write_states(folder / "activations.safetensors", found, _hidden()[0])


def _make_vllm(folder: Path) -> None:
    from safetensors.numpy import save_file

    for number, count in enumerate((3, 5)):
        tokens = np.arange(count) % 3 + number
        held = np.random.default_rng(number).standard_normal((count, 2, 4)).astype(np.float32)
        save_file({"token_ids": tokens, "hidden_states": held}, folder / f"{number}.safetensors")


def _save_npy(folder: Path) -> None:
    np.save(folder / "states.npy", _hidden())


def _save_npz(folder: Path) -> None:
    np.savez(folder / "states.npz", hidden=_hidden(), sample_ids=np.array(list("abcdef")), units=np.arange(6))


def _any_model(folder: Path) -> Any:
    from jaxcrit.core.errors import UserError
    from jaxcrit.evidence.states import _sizes

    return _sizes(str(folder), UserError("another model"))


DEPTH = 8


def _score() -> dict[str, Any]:
    trained = {"layers": [0, 1], "criteria": ["delta"], "rules": ["critical:2"]}
    meta = {"window": 5, "num_samples": 6, "model_hash": "a", "unchanged": 1.0, "trained": trained}
    values = [0.1 * number for number in range(1, DEPTH)]
    return {"values": [*values, None], "valid": [*[True] * 7, False], "direction": "low", "stderr": None, "meta": meta}


def _make_scores(folder: Path) -> None:
    from jaxcrit.core.deletions import write_deletions
    from jaxcrit.core.files import write_json

    scores = {"delta_debiased": _score(), "step": {**_score(), "direction": "high", "stderr": [*[0.1] * 7, None]}}
    write_json(folder / "scores.json", "jaxcrit.scores", {"num_layers": DEPTH, "scores": scores})
    left = {name: np.full((6, DEPTH), 0.2) for name in scores}
    write_deletions(folder, left, list("abcdef"))


def _scores(folder: Path) -> Any:
    """What `jaxcrit select`, `correlate` and the report of a sweep make of the file."""
    import jaxcrit as jc
    from jaxcrit.api import Scores
    from jaxcrit.core.layers import read_scores
    from jaxcrit.evidence.rows import read_back
    from jaxcrit.selection.correlation import correlate

    found = read_scores(folder / "scores.json", deletions=True)
    read_back(folder)
    for key in found:
        jc.select(Scores(found), f"{key}:1")
    return correlate(*list(found.values())[:2], circular=True) if len(found) > 1 else None


def _layers(folder: Path) -> Any:
    from jaxcrit.core.selections import LayerSpec, resolve

    return resolve(LayerSpec.parse(f"@{folder / 'layers.json'}"), 3)


def _make_fingerprint(folder: Path, layers: int = 3, samples: int = 5) -> None:
    from jaxcrit.core.files import write_npz
    from jaxcrit.evidence.fingerprint import FINGERPRINT_FORMAT, FingerprintMeta

    hidden = np.random.default_rng(0).standard_normal((layers, samples, 8))
    hidden -= hidden.mean(axis=1, keepdims=True)
    upper = np.triu_indices(samples)
    grams = np.stack([(one @ one.T)[upper] for one in hidden]).astype(np.float32)
    arrays = {"gram": grams, "sample_ids": np.array([f"{n:064x}" for n in range(samples)]), "units": np.arange(samples)}
    meta = {**example(FingerprintMeta), "num_layers": layers, "position": "last"}
    write_npz(folder / "fingerprint.npz", arrays, {**meta, "format": FINGERPRINT_FORMAT, "format_version": 1})


def _fingerprint(folder: Path) -> Any:
    from jaxcrit.evidence.fingerprint import read_fingerprint

    found = read_fingerprint(str(folder))
    return [gram.sum(dtype=np.float64) for gram in found.grams]


def _make_run(folder: Path) -> None:
    """A finished run of analyze, as far as its files are read back."""
    from jaxcrit.core.files import write_json
    from jaxcrit.core.hashing import sha256_json
    from jaxcrit.core.rundir import RunRecord
    from jaxcrit.evidence.fingerprint import GramRun

    _make_fingerprint(folder)
    _make_scores(folder)
    record = {**example(RunRecord), **example(GramRun), "command": "analyze", "status": "complete"}
    record |= {"data": {"rows": {"hash": "a"}}, "identity": sha256_json({"command": "analyze"})}
    record["layers"] = {**record["layers"], "layers": [1], "num_layers": 3}
    record.pop("digests", None)  # with them any damage would be refused before it is looked at
    write_json(folder / "run.json", "jaxcrit.run", record)
    write_json(folder / "layers.json", "jaxcrit.layers", record["layers"])


def _run(folder: Path) -> Any:
    import jaxcrit as jc
    from jaxcrit.core.rundir import RunDirectory
    from jaxcrit.evidence.fingerprint import read_run

    found = jc.open_run(folder)
    read_run(folder)
    RunDirectory.open(folder, {"command": "analyze"})
    return found.arrays, found.tables, found.layers


def _make_explored(folder: Path) -> None:
    """Without digests, by which all damage would be seen before it is read."""
    from jaxcrit.core.files import write_json
    from jaxcrit.core.rundir import read_record
    from support.explored import write_run

    write_run(folder, num_layers=DEPTH)
    said = ("digests", "format", "format_version")
    record = {key: value for key, value in read_record(folder).items() if key not in said}
    write_json(folder / "run.json", "jaxcrit.run", record)


def _explored(folder: Path) -> Any:
    from jaxcrit.reporting.explore import index_rows, page_data
    from jaxcrit.reporting.explore_reading import read_runs

    found = read_runs([str(folder)])
    return page_data(found, trim=2), index_rows(found)


def _verified(folder: Path) -> Any:
    from jaxcrit.studies.verification import verify

    return verify(folder, 1e-3)


def _read_json(name: str, form: str, kind: Any) -> Callable[[Path], object]:
    from jaxcrit.core.files import read_json

    return lambda folder: read_json(folder / name, form, kind)


def _edited_record() -> dict[str, Any]:
    from jaxcrit.commands.edit import EditedRun

    record = example(EditedRun)
    record["layers"] = {**record["layers"], "layers": [1], "num_layers": 3}
    return record


def _edited(folder: Path) -> Any:
    from jaxcrit.commands.edit import EditedRun, report
    from jaxcrit.core.rundir import read_record

    return report(read_record(folder, EditedRun)).text()


def _make_substituted(folder: Path) -> None:
    from jaxcrit.commands.substitute import SubstitutedRun
    from jaxcrit.core.files import write_json

    record = example(SubstitutedRun)
    result, entry = record["result"], record["result"]["sets"][0]
    record["result"] = {
        **result,
        "centres": [1],
        "sets": [{**entry, "layers": [1]}],
        "random": [],
        "changed": [0, 1, 2],
    }
    write_json(folder / "run.json", "jaxcrit.run", {**record, "command": "substitute", "status": "complete"})
    losses = {"losses": np.ones((1, 4)), "host": np.ones(4), "guest": np.ones(4)}
    beside = {"tokens": np.ones(4, int), "sample_ids": np.array(list("abcd"))}
    _npz("substitution.npz", "jaxcrit.substitution", {**losses, **beside})(folder)
    score = {"num_layers": DEPTH, "scores": {"substitution": _score()}}
    write_json(folder / "scores.json", "jaxcrit.scores", score)


def _substituted(folder: Path) -> Any:
    from jaxcrit.commands.substitute import SubstitutedRun, _finished, report
    from jaxcrit.core.rundir import read_record

    return report(_finished(read_record(folder, SubstitutedRun), folder)).text()


def _kept_losses(folder: Path) -> Any:
    from jaxcrit.evidence.rows import _kept

    return _kept(SimpleNamespace(path=folder, identity="me"), "partial.npz", 3, 4)  # type: ignore[arg-type]


def _remembered(folder: Path) -> Any:
    """A cache of arrays, in the place where it would be."""
    from jaxcrit.core.remembered import _file, recalled
    from jaxcrit.core.schema import Array

    with _cache(folder):
        kept = _file("covariance", {"rows": "a"})
        kept.parent.mkdir(parents=True)
        (folder / "moment.npz").replace(kept)
        found = recalled("covariance", {"rows": "a"}, {"moment": Array("f", (4, 4))})
    assert found is None or found["moment"].shape == (4, 4)
    return found


def _answers(folder: Path) -> Any:
    from jaxcrit.commands.generate import Answer
    from jaxcrit.evidence.rows import GrowingRows

    return GrowingRows(folder / "generations.jsonl", lambda row: row["row"], Answer).rows


def _metrics(folder: Path) -> Any:
    from jaxcrit.training.loop import read_metrics

    return read_metrics(folder), _cut(folder)


def _cut(folder: Path) -> Any:
    from jaxcrit.training.loop import MetricsLog

    log = MetricsLog(folder / "metrics.jsonl")
    log.cut(2)
    return log.rows


def _tests(folder: Path) -> Any:
    from jaxcrit.studies.backdoor import ArmTests, read_tests

    return read_tests(folder / "arm.json", ArmTests)


def _verdicts(folder: Path) -> Any:
    from jaxcrit.commands.screen import Verdict
    from jaxcrit.evidence.rows import GrowingRows

    return GrowingRows(folder / "partial_flags.jsonl", lambda row: row["place"], Verdict).rows


def _trace(folder: Path) -> Any:
    from jaxcrit.commands.trace import read_trace

    return read_trace(folder / "trace.npz", 3)


def _keys(folder: Path) -> Any:
    from jaxcrit.commands.edit import read_keys

    return read_keys(folder / "keys.npz", 3, 4)


def _sought(folder: Path) -> Any:
    from jaxcrit.commands.edit import _keeper
    from jaxcrit.core.schema import Array

    keep = _keeper(SimpleNamespace(path=folder, identity="me", resumed=True))  # type: ignore[arg-type]
    holds = {"delta": Array("f", (2, 4)), "before": Array("f", (2,))}
    return keep("1/1", lambda: {"delta": np.zeros((2, 4)), "before": np.zeros(2)}, holds)


def _study(folder: Path) -> Any:
    from jaxcrit.commands.reuse import read_study

    return read_study(folder / "reuse.json")


def _remixed(folder: Path) -> Any:
    from jaxcrit.commands.remix import read_study

    return read_study(folder / "remix.json")


def _remixed_rows(folder: Path) -> Any:
    from jaxcrit.commands.remix import read_remixed

    return read_remixed(folder / "remix.jsonl")


@functools.cache
def _trainer() -> Any:
    from support.tiny_training import Trainer, random_batch

    trainer = Trainer()
    trainer.run(random_batch(seed=0))
    return trainer


def _make_trained(folder: Path) -> None:
    from jaxcrit.training.checkpoints import Checkpoints

    with Checkpoints(folder) as checkpoints:
        checkpoints.save(_trainer().state, {"note": 1}, loss=0.5)


def _trained(folder: Path) -> Any:
    import jax

    from jaxcrit.models.trained import trained_parameters
    from jaxcrit.training.checkpoints import Checkpoints
    from jaxcrit.training.step import abstract_state, state_shardings

    trainer = _trainer()
    like = abstract_state(trainer.partition, trainer.optimizer, trainer.state.params)
    places = state_shardings(like, trainer.mesh)
    like = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), like, places)
    trained_parameters(folder, lambda _: like.params)
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(like, dict[str, int])


def _tuned_record() -> dict[str, Any]:
    from jaxcrit.models.model import TunedRun

    record = {**example(TunedRun), "command": "finetune", "model": {"path": "embedded", "hash": "another"}}
    record["layers"] = {**record["layers"], "layers": [1], "num_layers": 3}
    return record


def _tuned(folder: Path) -> Any:
    """A fine-tuned model is opened as far as the hash of its base, which is another here."""
    from jaxcrit.core.errors import UserError
    from jaxcrit.models.model import open_model

    try:
        return open_model(folder)
    except UserError as error:
        return error if "put the original back" in str(error) else _raised(error)


def _raised(error: Exception) -> Any:
    raise error


def _toml(folder: Path) -> Any:
    from jaxcrit.commands.analyze import OPTIONS
    from jaxcrit.core.flags import read
    from jaxcrit.core.groups import ProcessOptions

    return read([OPTIONS, ProcessOptions], "analyze", [f"--config={folder / 'options.toml'}"])


def _flagfile(folder: Path) -> Any:
    from jaxcrit.commands.analyze import OPTIONS
    from jaxcrit.core.flags import read
    from jaxcrit.core.groups import ProcessOptions

    return read([OPTIONS, ProcessOptions], "analyze", [f"--flagfile={folder / 'options.flags'}"])


ROWS: list[dict[str, Any]] = [
    {"prompt": "one"},
    {"prompt": "two", "response": "2"},
    {"messages": [{"role": "user", "content": "three"}, {"role": "assistant", "content": "3"}], "tools": []},
    {"text": "four", "more": {"a": [1, None, 2.5]}},
    {"prompt": [{"role": "user", "content": "five"}], "completion": "5"},
]
FACTS: list[dict[str, Any]] = [
    {"prompt": "The capital of {} is", "subject": "France", "target": "Paris", "paraphrases": ["France's capital is"]},
    {
        "requested_rewrite": {
            "prompt": "{} is in",
            "subject": "Rome",
            "target_new": {"str": "Spain"},
            "target_true": {"str": "Italy"},
            "relation_id": "P1",
        },
        "paraphrase_prompts": ["Rome lies in"],
        "neighborhood_prompts": ["Milan is in"],
    },
    {
        "src": "Who wrote Emma?",
        "subject": "Emma",
        "alt": "Bob",
        "answers": ["Austen"],
        "rephrase": "Emma is by",
        "loc": "a",
        "loc_ans": "b",
    },
    {
        "prompt": "Water is",
        "subject": "Water",
        "target_new": "dry",
        "ground_truth": "wet",
        "rephrase_prompt": "Water feels",
        "locality": {"x": {"prompt": "Fire is", "ground_truth": "hot"}},
    },
]
PACKED = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
DOLLY = [{"instruction": "a", "context": "", "response": "b", "category": "open_qa"} for _ in range(3)]


def _as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _packed_rows(suffix: str) -> Reader:
    name, packed = f"rows.jsonl.{suffix}", PACKED[suffix](_as_lines(ROWS))
    return Reader(f"rows, {suffix}", _written(name, packed), _rows(name), share=0.5)


def _rows(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        from jaxcrit.data.datasets import conversation, read_rows

        found = read_rows(folder / name)
        return [conversation(row) for row in found if "text" not in row]

    return read


def _table(kind: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(
            [{"prompt": f"row {number}", "response": "yes", "n": number} for number in range(3)]
        )
        if kind == "parquet":
            pyarrow.parquet.write_table(table, folder / "rows.parquet")
            return
        with pyarrow.OSFile(str(folder / "rows.arrow"), "wb") as file:
            opened = pyarrow.ipc.new_file if kind == "arrow" else pyarrow.ipc.new_stream
            with opened(file, table.schema) as writer:
                writer.write_table(table)

    return make


def _make_saved(folder: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list([{"prompt": f"row {number}"} for number in range(3)]).save_to_disk(str(folder))


def _saved(folder: Path) -> Any:
    from jaxcrit.data.datasets import load

    return load(str(folder))


def _published(folder: Path) -> Any:
    from jaxcrit.data.datasets import load

    return load(f"dolly:{folder / 'rows.jsonl'}", split="all")


def _facts(folder: Path) -> Any:
    from jaxcrit.data.facts import read_facts

    return [fact.sample_id for fact in read_facts(str(folder / "facts.jsonl"))]


def _ablated(folder: Path) -> Any:
    from jaxcrit.commands.ablate import Ablated, AblatedRun, report
    from jaxcrit.core.rundir import read_record
    from jaxcrit.evidence.rows import read_back

    record = read_record(folder, AblatedRun)
    return report(Ablated(read_back(folder), {}, record, folder)).text()


def _exchanged(fmt: str) -> Reader:
    """A selection in another trainer's words."""
    from jaxcrit.core.layers import LayerSet
    from jaxcrit.reporting import matchers
    from jaxcrit.reporting.exporters import Asked, export_selection
    from jaxcrit.reporting.readback import read_back
    from support.other_trainers import tensors

    chosen, asked = LayerSet((1, 5), "manual", "1,5", 12), Asked("MODEL", "llama", tensors("llama"))
    name = "file.json" if fmt == "peft" else "file.yml"
    text = export_selection(chosen, fmt, asked=asked)

    def read(folder: Path) -> Any:
        with mock.patch.object(matchers, "_own_peft", lambda: None):  # whose import alone takes seconds
            return read_back(folder / name, fmt, chosen, asked).lines()

    return Reader(f"selection, {fmt}", _written(name, text), read, share=0.1)


def _make_ablated(folder: Path) -> None:
    from jaxcrit.commands.ablate import AblatedRun
    from jaxcrit.core.files import write_json

    write_json(folder / "run.json", "jaxcrit.run", {**example(AblatedRun), "command": "ablate", "status": "complete"})
    scores = {"num_layers": DEPTH, "scores": {"ablation_skip": _score()}}
    write_json(folder / "scores.json", "jaxcrit.scores", scores)


def readers() -> dict[str, Reader]:
    """All of them by name."""
    from jaxcrit.commands.finetune import FinetunedRun
    from jaxcrit.commands.generate import Answer
    from jaxcrit.commands.remix import REMIX_FORMAT, RemixedRow
    from jaxcrit.commands.remix import Study as Remix
    from jaxcrit.commands.reuse import REUSE_FORMAT, ReuseRun, Study
    from jaxcrit.commands.screen import Verdict
    from jaxcrit.commands.trace import TracedRun
    from jaxcrit.core.rundir import read_record
    from jaxcrit.criteria.trace import KINDS
    from jaxcrit.reporting.card import Certain, ChangedRun, card
    from jaxcrit.studies.backdoor import ARM_FORMAT, ArmTests
    from jaxcrit.training.loop import LossRow

    run = functools.partial(_ours, "run.json", "jaxcrit.run")
    certain = _ours("analysis/uncertainty.json", "jaxcrit.uncertainty", Certain)
    tests = _written("metrics.jsonl", _as_lines([example(LossRow) | {"kind": "eval"}] * 3))
    carded = _several(run(ChangedRun, config={"analysis": ""}), certain, tests)
    answers = [{**example(Answer), "row": row} for row in range(3)]
    losses = {"losses": np.ones((3, 4)), "tokens": np.ones(4, int)}
    sought = {"1/1/delta": np.ones((2, 4)), "1/1/before": np.ones(2)}
    keys = {"layer_1": np.ones((2, 4)), "layer_2": np.ones((5, 4))}
    effects = {**dict.fromkeys(KINDS, np.ones((5, 3))), **dict.fromkeys(("p", "corrupted"), np.ones(5))}
    effects["sample_ids"] = np.array(list("abcde"))
    families = "llama-llama3", "gemma3-linear-capped", "qwen2-mixed-sliding", "smollm3", "phi3-longrope", "olmo3-yarn"
    csv = 'prompt,response,n\none,yes,1\n"two, three",,2\n'
    found = [
        *map(_config_of, families),
        Reader("any config.json", _written("config.json", {"model_type": "x", "n_layer": 3, "n_embd": 4}), _any_model),
        Reader("index of shards", _sharded, _checkpoint, ("model.safetensors.index.json",)),
        Reader("model.safetensors", _copy_tiny, _checkpoint, ("model.safetensors",), 0.5),
        Reader("digest cache", _written("digests.json", {"a": ["F32", [1], "0" * 64]}), _read_digests),
        Reader("generation_config.json", _written("generation_config.json", {"eos_token_id": [1, 2]}), _stops),
        Reader("adapter", _make_adapter, _adapter, share=0.5),
        Reader("tokenizer", _make_tokenizer, _load_tokenizer, share=0.15),
        Reader("template", _written("template.jinja", CHAT_TEMPLATE), _template, share=0.02),
        Reader("GGUF", _make_gguf, _gguf, share=0.5),
        Reader("tokenizer of GGUF", _make_gguf, _gguf_tokenizer, share=0.1),
        Reader("states, own", _make_own_states, _states("activations.safetensors")),
        Reader("states, safetensors", _make_own_states, _states("activations.safetensors", limit=2), share=0.5),
        Reader("states, npy", _save_npy, _states("states.npy", axes="lnd", ends="blocks")),
        Reader("states, npz", _save_npz, _states("states.npz", axes="lnd", ends="embed")),
        Reader("states, vLLM", _make_vllm, _states("", ends="blocks", position="all")),
        Reader("scores and deletions", _make_scores, _scores),
        *map(_exchanged, ("peft", "axolotl", "swift", "tunix", "nnx", "mergekit")),
        Reader("layers.json", _ours("layers.json", "jaxcrit.layers", _chosen(), layers=[1], num_layers=3), _layers),
        Reader("fingerprint", _make_fingerprint, _fingerprint),
        Reader("run directory", _make_run, _run, share=0.5),
        Reader("run to verify", _make_run, _verified, share=0.2),
        Reader("run to explore", _make_explored, _explored, share=0.5),
        Reader("run of finetune", run(FinetunedRun), lambda folder: read_record(folder, FinetunedRun)),
        Reader("run for a card", carded, lambda folder: card("name", "base", [folder]), share=0.5),
        Reader("run of reuse", run(ReuseRun), lambda folder: read_record(folder, ReuseRun)),
        Reader("run of trace", run(TracedRun), lambda folder: read_record(folder, TracedRun)),
        Reader("run of edit", run(_edited_kind(), **_edited_record()), _edited),
        Reader("run of substitute", _make_substituted, _substituted, share=0.5),
        Reader("run of ablate", _make_ablated, _ablated, share=0.5),
        Reader("tuned model", _written_run(_tuned_record()), _tuned, share=0.1),
        Reader("checkpoints of a run", _make_trained, _trained, share=0.02),
        Reader("losses so far", _npz("partial.npz", "jaxcrit.partial", losses, identity="me"), _kept_losses),
        Reader("sought so far", _npz("partial.npz", "jaxcrit.partial", sought, identity="me"), _sought),
        Reader("keys of edits", _npz("keys.npz", "jaxcrit.keys", keys), _keys),
        Reader("trace.npz", _npz("trace.npz", "jaxcrit.trace", effects), _trace),
        Reader("covariance cache", _npz("moment.npz", "jaxcrit.covariance", {"moment": np.eye(4)}), _remembered),
        Reader("answers so far", _written("generations.jsonl", _as_lines(answers)), _answers),
        Reader("verdicts so far", _written("partial_flags.jsonl", _as_lines([example(Verdict)] * 2)), _verdicts),
        Reader("metrics.jsonl", _written("metrics.jsonl", _as_lines([example(LossRow)] * 3)), _metrics),
        Reader("arm.json", _ours("arm.json", ARM_FORMAT, ArmTests), _tests),
        Reader("reuse.json", _ours("reuse.json", REUSE_FORMAT, Study), _study),
        Reader("remix.json", _ours("remix.json", REMIX_FORMAT, Remix), _remixed),
        Reader("remix.jsonl", _written("remix.jsonl", _as_lines([example(RemixedRow)] * 2)), _remixed_rows),
        Reader("options, TOML", _written("options.toml", 'data = "demo"\nlimit = 24\nout = "x"\n'), _toml),
        Reader("options, flags", _written("options.flags", "--data=demo\n--limit=24\n# more\n--out=x\n"), _flagfile),
        Reader("rows, jsonl", _written("rows.jsonl", _as_lines(ROWS)), _rows("rows.jsonl")),
        Reader("rows, json", _written("rows.json", ROWS), _rows("rows.json")),
        Reader("rows, csv", _written("rows.csv", csv), _rows("rows.csv")),
        Reader("rows, tsv", _written("rows.tsv", csv.replace(",", "\t")), _rows("rows.tsv")),
        Reader(
            "rows, UTF-16",
            _written("rows.jsonl", _as_lines(ROWS).decode().encode("utf-16")),
            _rows("rows.jsonl"),
            share=0.3,
        ),
        *map(_packed_rows, ("gz", "bz2", "xz")),
        Reader("rows, parquet", _table("parquet"), _rows("rows.parquet")),
        Reader("rows, arrow", _table("arrow"), _rows("rows.arrow")),
        Reader("rows, arrow stream", _table("stream"), _rows("rows.arrow")),
        Reader("rows, saved dataset", _make_saved, _saved, share=0.1),
        Reader("rows, dolly", _written("rows.jsonl", _as_lines(DOLLY)), _published),
        Reader("facts", _written("facts.jsonl", _as_lines(FACTS)), _facts),
    ]
    return {one.name: one for one in found}


def _chosen() -> Any:
    from jaxcrit.core.layers import ChosenLayers

    return ChosenLayers


def _edited_kind() -> Any:
    from jaxcrit.commands.edit import EditedRun

    return EditedRun


def _written_run(record: dict[str, Any]) -> Callable[[Path], object]:
    from jaxcrit.core.files import write_json

    return lambda folder: write_json(folder / "run.json", "jaxcrit.run", record)
