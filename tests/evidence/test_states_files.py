"""Hidden states in files: what each kind means, what is asked about, and what is refused in one line."""

from __future__ import annotations

import io
import json
import pickle
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.tiny_model import prompts_file, tiny_checkpoint

import jaxcrit as jc
from jaxcrit.commands.main import main
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_json, read_npz
from jaxcrit.core.groups import AnalyzeOptions
from jaxcrit.core.layers import read_scores
from jaxcrit.evidence import states
from jaxcrit.evidence.states_files import read_all, read_states
from jaxcrit.parallel.mesh import make_mesh
from jaxcrit.studies.analysis import run_analysis

LAYERS, SAMPLES, WIDTH = 7, 12, 24


def streams(samples=SAMPLES, seed=0):
    """States ``[L, N, D]`` that grow block by block, as those of a model."""
    steps = np.random.default_rng(seed).standard_normal((LAYERS, samples, WIDTH))
    return np.cumsum(steps, axis=0).astype(np.float32)


def normed(hidden):
    """The last layer behind a norm without weights."""
    last = hidden[-1] / np.sqrt(np.mean(hidden[-1] ** 2, axis=-1, keepdims=True))
    return np.concatenate([hidden[:-1], last[None]])


def vllm(folder, dtype=ml_dtypes.bfloat16, layers_first=False, embed=False, prompts=SAMPLES, seed=0):
    """A directory as vLLM's connector leaves it; and the states ``[L, T, D]`` of every prompt."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((9, WIDTH))
    kept = []
    for number in range(prompts):
        tokens = rng.integers(0, 9, 10 + number)
        hidden = np.cumsum(np.concatenate([table[tokens][None], rng.standard_normal((LAYERS, len(tokens), WIDTH))]), 0)
        hidden = hidden[1 - embed :].astype(dtype)
        stored = hidden if layers_first else hidden.swapaxes(0, 1)
        save_file(
            {"hidden_states": np.ascontiguousarray(stored), "token_ids": tokens},
            folder / f"{number}-9f3a.safetensors",
        )
        (folder / f"{number}-9f3a.safetensors.lock").touch()
        kept.append(hidden[embed:].astype(np.float32))
    return kept


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize("position", ["last", "all"])
def test_own_states_come_back_bit_for_bit(position, model, tmp_path):
    data = prompts_file(tmp_path / "prompts.jsonl")
    asked = ["--layers=critical:2", "--measures=rsa"]
    rows = [f"--model={model}", f"--data={data}", f"--position={position}", "--save_activations", "--embed"]
    assert main(["analyze", *rows, *asked, f"--out={tmp_path / 'run'}"]) == 0
    given = ["analyze", f"--states={tmp_path / 'run'}", *asked, "--save_activations", f"--out={tmp_path / 'again'}"]
    assert main(given) == 0
    for name in ("scores.json", "layers.json", "uncertainty.json", "cka.npz", "measures.npz", "configs/peft.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name
    ours, theirs = (read_npz(tmp_path / run / "fingerprint.npz") for run in ("again", "run"))
    for key, value in theirs[0].items():
        np.testing.assert_array_equal(ours[0][key], value)
    assert {**ours[1], "identity": ""} == {**theirs[1], "identity": ""}
    kept = load_file(tmp_path / "again" / "activations.safetensors")
    np.testing.assert_array_equal(kept["hidden"], load_file(tmp_path / "run" / "activations.safetensors")["hidden"])
    # With the model beside it, which is that one; and the finished run, which these states determine.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "again").glob("fingerprint.npz")}
    assert main([*given, f"--model={model}"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_what_needs_a_model_says_so():
    found = jc.states(streams(), axes="lnd")
    with pytest.raises(UserError, match="criteria out: needs a model; states have δ and step alone"):
        jc.score(found, criteria="lens_kl", out="run")
    for call in (jc.generate, jc.ablate, jc.capture):
        with pytest.raises(UserError, match=r"hidden states \(7, 12, 24\) of memory") as raised:
            call(found, [[1, 2, 3]])
        assert "\n" not in str(raised.value)


def test_a_run_of_several_datasets_comes_back(tmp_path):
    asked = ["--layers=critical:2", "--trim=1", f"--out={tmp_path / 'run'}", "--save_activations"]
    rows = ["--data=demo:arithmetic,demo:choice", "--limit=12"]
    assert main(["analyze", *rows, *asked]) == 0
    assert main(["analyze", f"--states={tmp_path / 'run'}", *asked[:2], f"--out={tmp_path / 'again'}"]) == 0
    for name in ("scores.json", "arithmetic/scores.json", "choice/cka.npz", "layers.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name


def test_the_same_array_in_every_kind_of_file(tmp_path):
    hidden = streams()
    np.save(tmp_path / "a.npy", hidden)
    np.save(tmp_path / "turned.npy", hidden.swapaxes(0, 1))
    np.savez(tmp_path / "b.npz", anything=hidden, sample_ids=np.arange(100, 112))
    np.savez_compressed(tmp_path / "c.npz", hidden=hidden, other=np.zeros(3), sample_ids=[f"q{i}" for i in range(12)])
    save_file({"states": hidden.astype(np.float64)}, tmp_path / "d.safetensors")
    embed = np.random.default_rng(1).standard_normal((1, SAMPLES, WIDTH))
    np.save(tmp_path / "e.npy", np.concatenate([embed, hidden]))
    for name, axes, ends in (
        ("a.npy", "lnd", "blocks"),
        ("turned.npy", "nld", "blocks"),
        ("b.npz", "lnd", "blocks"),
        ("c.npz", "lnd", "blocks"),
        ("d.safetensors", "lnd", "blocks"),
        ("e.npy", "lnd", "embed"),
    ):
        found = jc.states(tmp_path / name, axes=axes, ends=ends)
        np.testing.assert_array_equal(found.hidden, hidden, err_msg=name)
        assert found.name == name.partition(".")[0] and found.source == str(tmp_path / name)
    assert jc.states(str(tmp_path / "b.npz"), axes="lnd", ends="blocks").sample_ids[0] == "100"
    assert jc.states(tmp_path / "c.npz", axes="lnd", ends="blocks").sample_ids[11] == "q11"
    first = read_states(tmp_path / "c.npz", axes="lnd", ends="blocks", limit=5)
    assert first.sample_ids == [f"q{i}" for i in range(5)] and first.hidden.shape == (LAYERS, 5, WIDTH)
    both = read_all(f"{tmp_path}/a.npy,{tmp_path}/b.npz", axes="lnd", ends="blocks")
    assert [one.name for one in both] == ["a", "b"]
    assert both[0].describe()["hash"] != both[1].describe()["hash"], "ids tell runs apart"


@pytest.mark.parametrize("layers_first", [False, True])
def test_vllm_writes_a_file_per_prompt(layers_first, tmp_path):
    kept = vllm(tmp_path / "dump", layers_first=layers_first)
    last = read_states(tmp_path / "dump")
    np.testing.assert_array_equal(last.hidden, np.stack([one[:, -1] for one in kept], axis=1))
    assert last.dtype == "bfloat16" and last.position == "last" and len(set(last.sample_ids)) == SAMPLES
    mean = read_states(tmp_path / "dump", position="mean")
    np.testing.assert_allclose(mean.hidden, np.stack([one.mean(axis=1) for one in kept], axis=1), rtol=1e-5, atol=1e-5)
    tokens = read_states(tmp_path / "dump", position="all", limit=4)
    np.testing.assert_array_equal(tokens.hidden, np.concatenate(kept[:4], axis=1))
    assert tokens.units.tolist() == np.repeat(np.arange(4), [10, 11, 12, 13]).tolist()
    assert tokens.prompt_ids == last.sample_ids[:4]
    # Ids are those of token ids as rows.
    of_rows = jc.load().read(AnalyzeOptions(), [[1, 2, 3], [4, 5]])[0]
    shape = (LAYERS, 3, WIDTH) if layers_first else (3, LAYERS, WIDTH)
    one_prompt(tmp_path / "dump", [1, 2, 3], shape, "0-9f3a.safetensors")
    assert of_rows.sample_ids[0] == read_states(tmp_path / "dump", ends="blocks").sample_ids[0]


def test_the_embedding_in_front_is_told_by_tokens_that_stand_twice(tmp_path):
    kept = vllm(tmp_path / "dump", embed=True)
    found = read_states(tmp_path / "dump")
    np.testing.assert_array_equal(found.hidden, np.stack([one[:, -1] for one in kept], axis=1))
    assert any("embedding output, left out" in note for note in found.notes)
    np.testing.assert_array_equal(read_states(tmp_path / "dump", ends="embed").hidden, found.hidden)


def test_a_whole_run_on_states(tmp_path, capsys):
    """Errors, null, choice, selection, correlation and comparison; the run is told by the states themselves."""
    vllm(tmp_path / "dump", np.float32, prompts=20)
    assert main(["analyze", f"--states={tmp_path / 'dump'}", "--layers=critical:1", f"--out={tmp_path / 'run'}"]) == 0
    said = capsys.readouterr().out
    assert "do not name their layers" in said and "null" in said
    found = read_scores(tmp_path / "run" / "scores.json")
    assert found["delta_debiased"].stderr is not None and found["delta_debiased"].meta["model_hash"] is None
    expected = jc.score(jc.states(tmp_path / "dump"))
    np.testing.assert_allclose(found["delta_debiased"].values, expected["delta_debiased"].values, atol=1e-6)
    run = read_json(tmp_path / "run" / "run.json", "jaxcrit.run")
    assert run["model"]["hash"] is None and run["data"]["dump"]["num_samples"] == 20 and "template" not in run
    scores = tmp_path / "run" / "scores.json"
    assert main(["select", f"--scores={scores}", "--layers=step:2", "--format=peft"]) == 0
    assert main(["correlate", f"--scores={scores}", f"--scores={scores}:step", f"--out={tmp_path / 'pair'}"]) == 0
    assert main(["spectrum", f"--run={tmp_path / 'run'}", "--k=2", f"--out={tmp_path / 'spectrum'}"]) == 0
    other = vllm(tmp_path / "other", np.float32, prompts=20)
    for file in (tmp_path / "other").glob("*.safetensors"):
        arrays = load_file(file)
        save_file({**arrays, "hidden_states": arrays["hidden_states"] ** 3}, file)
    assert main(["analyze", f"--states={tmp_path / 'other'}", "--layers=all", f"--out={tmp_path / 'b'}"]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "run"), str(tmp_path / "b"), f"--out={tmp_path / 'compared'}"]) == 0
    assert "same model" not in capsys.readouterr().out and len(other) == 20
    again = ["analyze", f"--states={tmp_path / 'other'}", "--layers=critical:1", f"--out={tmp_path / 'run'}"]
    assert main(again) == 2 and "another" in capsys.readouterr().err


def test_several_files_give_a_consensus(tmp_path, capsys):
    for seed, name in enumerate("ab"):
        np.save(tmp_path / f"{name}.npy", streams(seed=seed))
    asked = [f"--states={tmp_path}/a.npy,{tmp_path}/b.npy", "--axes=lnd", "--ends=blocks", "--layers=critical:2"]
    assert main(["analyze", *asked, f"--out={tmp_path / 'run'}"]) == 0
    assert "mean rank" in capsys.readouterr().out and (tmp_path / "run" / "b" / "layers.json").exists()


def test_a_last_layer_behind_the_norm_is_no_layer(tmp_path):
    """No score looks at it: the others are those of the layers in front, and the depth stays the model's."""
    hidden = normed(streams(40))
    with pytest.raises(UserError, match=r"layer 6: all samples have one length.* say so with ends=normed"):
        jc.states(hidden, axes="lnd")
    with pytest.raises(UserError, match=r"say so with ends=embed,normed"):
        jc.states(hidden, axes="lnd", ends="embed")
    found = jc.score(jc.states(hidden, axes="lnd", ends="normed"))
    expected = jc.score(jc.states(hidden[:-1], axes="lnd"))
    for key, one in expected.items():
        assert found[key].valid.tolist() == [*one.valid, False], key
        np.testing.assert_allclose(found[key].values[:-1], one.values, atol=1e-6)
        np.testing.assert_allclose(found[key].stderr[:-1], one.stderr, atol=1e-6)
    assert any("final norm" in line for line in found.warnings)
    assert jc.select(found, "critical:2", trim=1).num_layers == LAYERS
    np.save(tmp_path / "states.npy", hidden)
    asked = [f"--states={tmp_path / 'states.npy'}", "--axes=lnd", "--ends=normed", "--layers=critical:2", "--trim=1"]
    assert main(["analyze", *asked, "--measures=rsa", "--save_activations", f"--out={tmp_path / 'run'}"]) == 0
    for key, one in read_scores(tmp_path / "run" / "scores.json").items():
        assert not one.valid[-1] and np.isnan(one.values[-1]), key
    assert jc.states(tmp_path / "run").normed, "our own file says so"


def test_the_model_says_how_many_layers_there_are(model, tmp_path, capsys):
    np.save(tmp_path / "a.npy", streams())
    asked = ["analyze", f"--states={tmp_path / 'a.npy'}", "--axes=lnd", "--ends=blocks", "--layers=critical:2"]
    assert main([*asked, f"--model={model}", f"--out={tmp_path / 'run'}"]) == 0
    layers = read_json(tmp_path / "run" / "layers.json", "jaxcrit.layers")
    assert layers["model_hash"] == jc.load(model).model_hash, "chosen layers are those of this model"


def test_the_depth_of_a_model_that_jaxcrit_does_not_run(tmp_path, capsys):
    np.save(tmp_path / "a.npy", streams())
    (tmp_path / "other").mkdir()
    content = {"model_type": "gpt2", "n_layer": LAYERS, "n_embd": WIDTH}
    (tmp_path / "other" / "config.json").write_text(json.dumps(content))
    asked = ["analyze", f"--states={tmp_path / 'a.npy'}", "--axes=lnd", "--ends=blocks", "--layers=critical:2"]
    asked += [f"--model={tmp_path / 'other'}", f"--out={tmp_path / 'run'}"]
    assert main(asked) == 0
    run = read_json(tmp_path / "run" / "run.json", "jaxcrit.run")
    assert "does not open" in run["warnings"]["a"][0] and "LLaMA's" in run["warnings"]["a"][1]
    assert run["model"]["family"] == "gpt2" and run["model"]["hash"] is None
    (tmp_path / "other" / "config.json").write_text(json.dumps({**content, "n_layer": 12}))
    capsys.readouterr()
    assert main(asked) == 2 and "states of 7 layers, but" in capsys.readouterr().err
    (tmp_path / "other" / "config.json").write_text("{}")
    assert main(asked) == 2 and "config.json" in capsys.readouterr().err


def header(shape, dtype="<f4"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def npz(path, name, content):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)


@pytest.mark.parametrize("form", ["resident", "tiled", "features"])
def test_eight_devices_find_what_one_finds(form, tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", streams(16))
    known = {"states": str(tmp_path / "a.npy"), "axes": "lnd", "ends": "blocks", "layers": "critical:2", "form": form}
    eight = run_analysis(AnalyzeOptions(**known), keep=False)
    monkeypatch.setattr(states, "make_mesh", lambda axes: make_mesh(axes, jax.devices()[:1]))
    one = run_analysis(AnalyzeOptions(**known), keep=False)
    assert one.run["devices"]["mesh"]["data"] == 1 and eight.run["devices"]["mesh"]["data"] == 8
    assert one.run["determines"] == eight.run["determines"]
    for key, score in one.scores.items():
        np.testing.assert_allclose(eight.scores[key].values, score.values, atol=1e-6, err_msg=key)


def packed(path, **arrays):
    with path.open("wb") as file:
        np.savez(file, **arrays)


def one_prompt(folder, tokens, shape, name="7.safetensors"):
    save_file({"hidden_states": np.ones(shape, np.float32), "token_ids": np.asarray(tokens)}, folder / name)


def damaged(folder, **changes):
    said = {"format": "jaxcrit.activations", "format_version": 1, "name": "a", "meta": {}, "dtype": "float32"}
    said |= {"notes": [], "normed": False, "prompt_ids": [str(i) for i in range(SAMPLES)], **changes}
    save_file({"hidden": streams()}, folder / "activations.safetensors", {"jaxcrit": json.dumps(said)})


def hollow(value, dtype=np.float32):
    hidden = streams().astype(dtype)
    hidden[2, 3, 4] = value
    return hidden


class Planted:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


KNOWN = ("--axes=lnd", "--ends=blocks")
BAD = {
    "absent": (lambda t: None, KNOWN, "no such file; expected activations.safetensors, an npy"),
    "does not say": (lambda t: np.save(t / "x.npy", streams()), (), "does not say what it holds; give --axes=lnd"),
    "axes alone": (lambda t: np.save(t / "x.npy", streams()), ("--axes=lnd",), "--ends=blocks, embed"),
    "unknown axes": (lambda t: np.save(t / "x.npy", streams()), ("--axes=dln",), "--axes=dln: expected lnd or nld"),
    "unknown ends": (lambda t: np.save(t / "x.npy", streams()), ("--ends=norm",), "--ends=norm: expected blocks or"),
    "two axes": (lambda t: np.save(t / "x.npy", streams()[0]), KNOWN, "three dimensions, layers, samples and width"),
    "one sample": (lambda t: np.save(t / "x.npy", streams(1)), KNOWN, "expected at least 4 samples, got 1"),
    "whole numbers": (lambda t: np.save(t / "x.npy", np.ones((3, 5, 2), int)), KNOWN, "array of floats, got int64"),
    "bfloat16 in numpy": (
        lambda t: np.save(t / "x.npy", streams().astype(ml_dtypes.bfloat16)),
        KNOWN,
        "numpy's files know no bfloat16: save float32",
    ),
    "NaN": (lambda t: np.save(t / "x.npy", hollow(np.nan)), KNOWN, "layer 2: NaN or infinite values"),
    "overflow": (
        lambda t: np.save(t / "x.npy", hollow(np.inf, np.float16)),
        KNOWN,
        "layer 2: 1 infinite values: float16 ends at 65,504; capture in bfloat16 or float32",
    ),
    "constant": (lambda t: np.save(t / "x.npy", np.ones((7, 5, 3))), KNOWN, "all 5 samples are the same"),
    "equal samples": (lambda t: np.save(t / "x.npy", streams()[:, [0, 1, 2, 3, 4, 0]]), KNOWN, "samples 0 and 5"),
    "normed": (lambda t: np.save(t / "x.npy", normed(streams())), KNOWN, "layer 6: all samples have one length"),
    "pickle": (lambda t: (t / "x.npy").write_bytes(pickle.dumps(Planted())), KNOWN, "expected activations.safetensors"),
    "objects": (
        lambda t: np.save(t / "x.npy", np.array([Planted()] * 4), allow_pickle=True),
        KNOWN,
        "Python objects, which are pickles and not read",
    ),
    "torch": (lambda t: npz(t / "x.npy", "archive/data.pkl", b"x"), KNOWN, "a zip file with 'archive/data.pkl'"),
    "text": (lambda t: (t / "x.npy").write_text("prompt,layer\n" * 9), KNOWN, "got something else, or a damaged one"),
    "empty": (lambda t: (t / "x.npy").write_bytes(b""), KNOWN, "got something else, or a damaged one"),
    "cut short": (
        lambda t: (t / "x.npy").write_bytes(header((7, 12, 24)) + b"\0" * 99),
        KNOWN,
        "expected 8064 bytes of shape (7, 12, 24), got 99",
    ),
    "more than memory": (
        lambda t: npz(t / "x.npy", "hidden.npy", header((10**6, 10**6, 10**6)) + b"\0" * 99),
        KNOWN,
        "GiB, this machine has",
    ),
    "cut short safetensors": (
        lambda t: (t / "x.npy").write_bytes((10**6).to_bytes(8, "little") + b'{"a":1}'),
        KNOWN,
        "got something else, or a damaged one",
    ),
    "several arrays": (
        lambda t: packed(t / "x.npy", a=streams(), b=streams()),
        KNOWN,
        "expected one array of hidden states, or one called hidden; got a, b",
    ),
    "ids twice": (
        lambda t: packed(t / "x.npy", hidden=streams(), sample_ids=[*range(11), 3]),
        KNOWN,
        "--sample_ids: expected each once, got '3' for 2 prompts",
    ),
    "too few ids": (
        lambda t: packed(t / "x.npy", hidden=streams(), sample_ids=[1, 2]),
        KNOWN,
        "--sample_ids: expected 12 of them, one for each sample; got 2",
    ),
    "position": (lambda t: np.save(t / "x.npy", streams()), (*KNOWN, "--position=all"), "files that hold every token"),
    "rows too": (lambda t: None, ("--data=demo:arithmetic", "--template=none"), "leave out --template --data"),
    "streamed": (lambda t: None, (*KNOWN, "--form=streamed"), "adds up while a model runs"),
    "other depth": (
        lambda t: np.save(t / "x.npy", streams()[:-1]),
        (*KNOWN, "--model=MODEL"),
        "states of 6 layers, but --model=MODEL has 7",
    ),
    "embedding in front": (
        lambda t: np.save(t / "x.npy", np.concatenate([streams()[:1] * 2, streams()])),
        (*KNOWN, "--model=MODEL"),
        "states of 8 layers, but --model=MODEL has 7; is the first the embedding output? then say --ends=embed",
    ),
    "no layers": (lambda t: np.save(t / "x.npy", streams()[:0]), KNOWN, "expected a layer and a dimension or more"),
    "no width": (lambda t: np.save(t / "x.npy", streams()[..., :0]), KNOWN, "expected a layer and a dimension or more"),
    "one unit for all": (
        lambda t: np.savez(t / "x", hidden=streams(), units=np.float64(1)) or (t / "x.npz").rename(t / "x.npy"),
        KNOWN,
        "expected units to be [samples], got shape []",
    ),
    "units in halves": (
        lambda t: np.savez(t / "x", hidden=streams(), units=np.ones(12)) or (t / "x.npz").rename(t / "x.npy"),
        KNOWN,
        "expected units to be whole numbers, got float64",
    ),
    "a bomb": (
        lambda t: np.savez_compressed(t / "x", hidden=np.zeros((3, 40, 9999))) or (t / "x.npz").rename(t / "x.npy"),
        KNOWN,
        "'hidden' unpacks to more than 200 times its size",
    ),
    "other width": (
        lambda t: np.save(t / "x.npy", streams()[..., :9]),
        (*KNOWN, "--model=MODEL"),
        "states of 9 dimensions, but --model=MODEL has 24",
    ),
    "one file of vLLM": (
        lambda t: save_file({"hidden_states": streams(), "token_ids": np.arange(7)}, t / "x.npy"),
        KNOWN,
        "holds one prompt, as vLLM writes it; give the directory",
    ),
    "no vLLM": (lambda t: (t / "x.npy").mkdir(), (), "for each prompt and nothing else; got none"),
    "other files": (
        lambda t: vllm(t / "x.npy") and (t / "x.npy" / "notes.txt").write_text("mine"),
        (),
        "and nothing else; got notes.txt",
    ),
    "another tool": (
        lambda t: (t / "x.npy").mkdir() or save_file({"a": streams()}, t / "x.npy" / "0.safetensors"),
        (),
        "0.safetensors: expected hidden_states and token_ids, as vLLM writes them; got a",
    ),
    "tokens missing": (
        lambda t: vllm(t / "x.npy") and one_prompt(t / "x.npy", [1, 2, 3], (5, LAYERS, WIDTH)),
        (),
        "expected as many states as token ids along one axis",
    ),
    "layers missing": (
        lambda t: vllm(t / "x.npy") and one_prompt(t / "x.npy", [1, 2, 3], (3, 5, WIDTH)),
        (),
        "expected one number of layers and width in all files, got (5, 24), (7, 24)",
    ),
    "prompt twice": (
        lambda t: (
            vllm(t / "x.npy") and [one_prompt(t / "x.npy", [1], (1, 7, 24), f"{n}.safetensors") for n in (98, 99)]
        ),
        (),
        "99.safetensors: holds the same prompt as 98.safetensors",
    ),
    "as long as deep": (
        lambda t: (t / "x.npy").mkdir() or one_prompt(t / "x.npy", np.arange(7), (7, 7, 24)),
        (),
        "prompts are all as long as there are layers; give --axes=nld",
    ),
    "no token twice": (
        lambda t: (t / "x.npy").mkdir() or one_prompt(t / "x.npy", np.arange(5), (5, 7, 24)),
        (),
        "no token stands twice in a prompt",
    ),
    "own axes": (
        lambda t: (t / "x.npy").mkdir() or damaged(t / "x.npy"),
        ("--axes=nld",),
        "jaxcrit's own, whose axes are lnd",
    ),
    "own, without ids": (
        lambda t: (t / "x.npy").mkdir() or damaged(t / "x.npy", prompt_ids=["a"]),
        (),
        "what it says of itself is damaged",
    ),
    "own, out of its directory": (
        lambda t: (t / "x.npy").mkdir() or damaged(t / "x.npy", name="../../b"),
        (),
        "of a plain name, got",
    ),
    "own, of later": (
        lambda t: (t / "x.npy").mkdir() or damaged(t / "x.npy", format_version=2),
        (),
        "expected jaxcrit.activations 1",
    ),
    "own, of another model": (
        lambda t: (t / "x.npy").mkdir() or damaged(t / "x.npy", meta={"model_hash": "0" * 64}),
        ("--model=MODEL",),
        "states of model 000000000000, but --model=MODEL has hash",
    ),
}


@pytest.mark.parametrize(("make", "flags", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_exit_2_and_nothing_written(make, flags, message, model, tmp_path, capsys):
    make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    asked = [flag.replace("MODEL", str(model)) for flag in flags]
    code = main(["analyze", f"--states={tmp_path / 'x.npy'}", *asked, f"--out={tmp_path / 'run'}"])
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("jaxcrit: error: ") and error.count("\n") == 1, error
    assert message.replace("MODEL", str(model)) in error, error
    assert sorted(tmp_path.rglob("*")) == before, "nothing half-written"
