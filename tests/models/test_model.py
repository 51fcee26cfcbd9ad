"""A model as an object: weights are read once, overlays leave what is below them as it is."""

from __future__ import annotations

import gc
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.tiny_model import tiny_checkpoint

import jaxcrit as jc
from jaxcrit.commands.substitute import SubstituteOptions, run_substitute
from jaxcrit.core.errors import UserError
from jaxcrit.criteria import substitution
from jaxcrit.criteria.substitution import join
from jaxcrit.models import model as models
from jaxcrit.models.checkpoint import DTYPES, load, open_checkpoint
from jaxcrit.models.lora import make_lora
from jaxcrit.models.model import open_model
from jaxcrit.models.overlays import Overlay
from jaxcrit.models.partition import TRAIN, partition
from jaxcrit.parallel.mesh import make_mesh

DEPTH = 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=DEPTH)


@pytest.fixture
def model(checkpoint):
    return open_model(checkpoint, mesh=make_mesh(None, jax.devices()[:1]))


def copies(weights):
    return {path: np.asarray(value).copy() for path, value in weights.items()}


def assert_same(weights, expected):
    assert weights.keys() == expected.keys()
    for path, value in weights.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(expected[path]), err_msg=path)


def blocks_moved(model, layers, by=1.0):
    """Whole layers, every weight larger by as much."""
    weights = copies(model.decoder().weights())
    moved = {path: jnp.asarray(value[layers] + by) for path, value in weights.items() if path.startswith("blocks.")}
    return Overlay(partition(model.config, layers), {TRAIN: moved}, None, 0)


def norm_moved(model):
    """The final norm, larger by 1."""
    return Overlay(partition(model.config, [], ["norm"]), {TRAIN: {"norm": model.decoder().norm + 1}}, None, 0)


def adapted(model, layers):
    """Adapters on the queries of layers."""
    lora = make_lora(model.config, 2, 0.0, ["q"])
    parts = partition(model.config, layers, lora=lora)
    entries = {path: jnp.ones_like(value) for path, value in lora.initial(model.config, layers, 0).items()}
    return Overlay(parts, {TRAIN: entries}, None, 0)


@pytest.mark.parametrize(
    "first", [norm_moved, lambda model: adapted(model, [1]), lambda model: blocks_moved(model, [3])]
)
def test_overlays_on_overlays_leave_everything_below_as_it_was(model, first):
    """The second changes arrays that the first left alone, and so are the base's own."""
    base = copies(model.decoder().weights())
    lower = model.with_overlay(first(model))
    below = copies(lower.decoder().weights())
    upper = lower.with_overlay(blocks_moved(lower, [1, 2]))
    for path, value in upper.decoder().weights().items():
        expected = below[path].copy()
        if path.startswith("blocks."):
            expected[[1, 2]] = below[path][[1, 2]] + np.float32(1)
        np.testing.assert_array_equal(np.asarray(value), expected)
    assert_same(lower.decoder().weights(), below)
    assert_same(model.decoder().weights(), base)
    assert_same(open_model(model.checkpoint.path, mesh=model.mesh).decoder().weights(), base)


def test_the_base_answers_bit_for_bit_after_trainings_of_it_and_on_top_of_it(checkpoint):
    """Adapters, then dense layers on them with everything outside the blocks, then both again: arrays are donated."""
    rows = [{"prompt": f"{number} cat {number * number}", "response": "dog sky"} for number in range(24)]
    quick = {"steps": 2, "batch_size": 8, "learning_rate": 1e-2}
    model = jc.load(checkpoint)
    base = copies(model.decoder().weights())
    answers = jc.generate(model, rows[:3], max_new_tokens=4).texts
    adapted = jc.finetune(model, rows, [1], lora_rank=2, lora_targets="q", **quick)
    between = copies(adapted.decoder().weights())
    whole = {"train_embeddings": True, "train_norms": True, "train_head": True}
    dense = jc.finetune(adapted, rows, "all", **whole, **quick)
    after = copies(dense.decoder().weights())
    assert_same(jc.finetune(adapted, rows, "all", **whole, **quick).decoder().weights(), after)
    assert_same(adapted.decoder().weights(), between)
    assert_same(model.decoder().weights(), base)
    assert jc.generate(model, rows[:3], max_new_tokens=4).texts == answers
    assert all(not np.array_equal(after[path], between[path]) for path in after)


def reads(monkeypatch):
    counted = []
    real = models.load
    monkeypatch.setattr(models, "load", lambda *given, **named: counted.append(1) or real(*given, **named))
    return counted


def test_weights_are_read_once_whatever_is_asked_first(checkpoint, tmp_path, monkeypatch):
    rows = [{"prompt": f"{number} cat", "response": "dog"} for number in range(12)]
    counted = reads(monkeypatch)
    model = jc.load(checkpoint)
    assert open_model(model, mesh="data=1", dtype="bfloat16") is model and jc.load(model) is model
    jc.finetune(model, rows, [1], steps=1, batch_size=8)
    tuned = jc.finetune(model, rows, [2], steps=1, batch_size=8)
    jc.substitute(model, tuned, rows, window=1)
    jc.finetune(tuned, rows, [3], steps=1, batch_size=8).decoder()
    assert model.decoder() is model.decoder() and tuned.decoder() is tuned.decoder()
    base, above = model.weights(), tuned.decoder().weights()
    shared = {path for path in base if base[path] is above[path]}
    assert shared == {path for path in base if not path.startswith("blocks.")}, "what an overlay leaves alone"
    assert len(counted) == 1
    assert jc.load(checkpoint).decoder() is not model.decoder() and len(counted) == 2


def test_what_a_command_takes_apart_is_in_memory_once(checkpoint, tmp_path, monkeypatch):
    other, rows = tiny_checkpoint(tmp_path / "other", num_hidden_layers=DEPTH, seed=1), tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{number} cat", "response": "dog"}) + "\n" for number in range(8)))
    found = []

    def live():
        return sum(array.nbytes for array in jax.live_arrays())

    def joined(config, base, tuned):
        one, before = sum(value.nbytes for path, value in tuned.items() if path.startswith("blocks.")), live()
        blocks = join(config, base, tuned)
        gc.collect()
        found.append((live() - before) / one)
        return blocks

    monkeypatch.setattr(substitution, "join", joined)
    run_substitute(SubstituteOptions(base=str(checkpoint), tuned=str(other), data=str(rows), window=3), keep=False)
    assert found and found[0] < 0.01
    model, tuned = jc.load(checkpoint), jc.load(other)
    before = copies(model.decoder().weights())
    jc.substitute(model, tuned, str(rows), window=3)
    assert_same(model.decoder().weights(), before)


def rounded(path, kinds):
    """A checkpoint whose tensors are of these dtypes in turn."""
    tiny_checkpoint(path, num_hidden_layers=3)
    tensors = load_file(path / "model.safetensors")
    kept = {name: value.astype(DTYPES[kinds[at % len(kinds)]]) for at, (name, value) in enumerate(tensors.items())}
    save_file(kept, path / "model.safetensors")
    return path


@pytest.mark.parametrize("overlaid", [False, True])
@pytest.mark.parametrize("dtype", ["", "float32", "bfloat16"])
@pytest.mark.parametrize("kinds", [["float32"], ["bfloat16"], ["float32", "bfloat16"]])
def test_what_trains_is_exact_whatever_was_asked_before(kinds, dtype, overlaid, tmp_path):
    path, mesh = rounded(tmp_path / "model", kinds), make_mesh(None, jax.devices()[:1])
    exact = {name: np.asarray(value, np.float32) for name, value in load(open_checkpoint(path)).weights().items()}
    overlay = None
    if overlaid:
        # Below what bfloat16 can hold of the sum: lost where the model's own dtype is taken for exact.
        moved = {name: value[[1]] + np.float32(1e-5) for name, value in exact.items() if name.startswith("blocks.")}
        exact |= {name: np.concatenate([exact[name][:1], value, exact[name][2:]]) for name, value in moved.items()}
    for ask in ("", "decoder", "weights"):
        for keep in (True, False):
            model = open_model(path, mesh=mesh, dtype=dtype, keep=keep)
            if overlaid:
                overlay = Overlay(partition(model.config, [1]), {TRAIN: jax.tree.map(jnp.asarray, moved)}, None, 0)
                model = model.with_overlay(overlay)
            if ask:
                getattr(model, ask)()
            found = {name: np.asarray(value, np.float32) for name, value in model.trainable().items()}
            assert_same(found, exact)


def test_describe_and_names(checkpoint, model, tmp_path):
    told = model.describe()
    assert told == {
        "path": str(checkpoint),
        "hash": model.model_hash,
        "family": "llama",
        "num_layers": DEPTH,
        "width": 24,
        "dtype": model.dtype,
        "ignored_keys": [],
        "notes": [],
    }
    json.dumps(told)
    tuned = model.with_overlay(blocks_moved(model, [2]))
    assert tuned.describe() == told | {"hash": tuned.model_hash}
    assert tuned.model_hash == model.with_overlay(blocks_moved(model, [2])).model_hash
    others = [blocks_moved(model, [3]), blocks_moved(model, [2], 2.0), adapted(model, [2]), norm_moved(model)]
    hashes = {one.model_hash for one in [model, tuned, *map(model.with_overlay, others)]}
    assert len(hashes) == 6
    assert jc.load().describe()["path"] == "embedded" and jc.load().short_name == "embedded"
    run = tmp_path / "run"
    rows = [{"prompt": f"{number} cat", "response": "dog"} for number in range(12)]
    jc.finetune(model, rows, [1], steps=1, batch_size=8, out=run)
    opened = jc.load(run)
    assert opened.describe()["path"] == str(run) and opened.short_name == "run" and opened.overlays[0].step == 1


def test_what_cannot_be_taken_from_another_model(model, tmp_path):
    other = open_model(tiny_checkpoint(tmp_path / "other", seed=1, num_hidden_layers=DEPTH), mesh="data=2,fsdp=4")
    for pair in ((model, other), (other, model)):
        with pytest.raises(UserError, match=r"expected models on one mesh, got \{'data': \d, .* open both with one"):
            pair[0].with_layers_of(pair[1], [1])
    with pytest.raises(UserError, match="expected layers 0 to 4, got -1"):
        model.with_layers_of(model, [-1])
    assert model.with_layers_of(model, []) is model


def test_a_run_that_could_not_be_opened_again_is_refused_before_it_trains(checkpoint, tmp_path):
    rows = [{"prompt": f"{number} cat", "response": "dog"} for number in range(12)]
    tuned = jc.finetune(jc.load(checkpoint), rows, [1], steps=1, batch_size=8)
    with pytest.raises(UserError, match=r"^out=.*/run: the model was tuned in memory, so a run on it"):
        jc.finetune(tuned, rows, [2], steps=1, batch_size=8, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    written = jc.load(jc.export(tuned, tmp_path / "tuned"))
    jc.finetune(written, rows, [2], steps=1, batch_size=8, out=tmp_path / "run")
    assert jc.load(tmp_path / "run").describe()["path"] == str(tmp_path / "run")
