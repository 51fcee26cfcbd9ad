"""``jaxcrit substitute`` and ``ablate`` from checkpoint directories to run directories; what they refuse."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pytest
from support.tiny import tiny_tokenizer_dir
from support.tiny_model import tiny_checkpoint

from jaxcrit.commands.ablate import AblateOptions, run_ablate
from jaxcrit.commands.finetune import run_finetune
from jaxcrit.commands.main import main
from jaxcrit.commands.substitute import SubstituteOptions, run_substitute
from jaxcrit.core.deletions import read_deletions
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_json, read_npz
from jaxcrit.core.groups import FinetuneOptions
from jaxcrit.core.layers import read_scores
from jaxcrit.evidence import rows as sweeps
from jaxcrit.parallel.preemption import Preempted


def pairs_file(path, count=20):
    rng = np.random.default_rng(0)
    words = ["cat", "dog", "sky", "one", "two", "blue", "sat", "mat", "and", "is"]
    line = lambda most: " ".join(rng.choice(words, rng.integers(1, most)))  # noqa: E731
    rows = [{"prompt": f"{i} {line(5)}", "response": line(9)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two checkpoints and rows, and a fine-tuning run on the first."""
    folder = tmp_path_factory.mktemp("inputs")
    base, data = tiny_checkpoint(folder / "base"), pairs_file(folder / "pairs.jsonl")
    tiny_checkpoint(folder / "tuned", seed=1)
    run_finetune(
        FinetuneOptions(
            model=str(base), data=str(data), layers="3", steps=4, learning_rate=2e-2, out=str(folder / "run")
        )
    )
    return folder


@pytest.fixture
def config(inputs, tmp_path):
    return SubstituteOptions(
        base=str(inputs / "base"),
        tuned=str(inputs / "tuned"),
        data=str(inputs / "pairs.jsonl"),
        window=3,
        out=str(tmp_path / "out"),
    )


def losses_of(out):
    """Losses of every row under every set of layers."""
    return read_npz(out / "substitution.npz")[0]["losses"]


def test_a_run(config, inputs, tmp_path):
    found = run_substitute(dataclasses.replace(config, random=4))
    score = found.scores["substitution"]
    assert score.valid.tolist() == [False, *[True] * 5, False] and score.direction == "high"
    assert score.meta["unchanged"] == found.tuned_loss and score.meta["window"] == 3
    stored = read_scores(tmp_path / "out" / "scores.json")
    np.testing.assert_array_equal(
        stored["substitution_per_token"].values, found.scores["substitution_per_token"].values
    )
    arrays, meta = read_npz(tmp_path / "out" / "substitution.npz")
    assert meta["format"] == "jaxcrit.substitution"
    assert arrays["losses"].shape == (9, 20) and arrays["random"].sum() == 4
    assert arrays["members"][:, :].sum(axis=1).tolist() == [3] * 9
    np.testing.assert_allclose(arrays["losses"][:5].mean(axis=1), score.values[1:6])
    np.testing.assert_allclose(
        np.average(arrays["losses"][0], weights=arrays["tokens"]), found.scores["substitution_per_token"].values[1]
    )
    np.testing.assert_allclose(arrays["guest"].mean(), found.base_loss)
    deletions = read_deletions(tmp_path / "out", "substitution")
    assert deletions.values.shape == (20, 7) and list(deletions.sample_ids) == arrays["sample_ids"].tolist()
    counts = found.block_evaluations
    assert counts["sweep"] == (7 + 6 + 5 + 4 + 3) + 7 and counts["a_pass_each"] == 6 * 7
    assert not (tmp_path / "out" / "partial.npz").exists()
    again = run_substitute(dataclasses.replace(config, random=4, batch_size=3))
    assert again.run["identity"] and again.run["time"] == found.run["time"], "read, not run"
    np.testing.assert_array_equal(again.scores["substitution"].values, score.values)


def test_windows_without_a_trained_layer_have_no_value(config, inputs, tmp_path, capsys):
    found = run_substitute(dataclasses.replace(config, tuned=str(inputs / "run")))
    score = found.scores["substitution"]
    assert score.valid.tolist() == [False, False, True, True, True, False, False]
    assert score.meta["trained"] == {"layers": [3], "criteria": ["manual"], "rules": ["3"]}
    assert [entry["changed"] for entry in found.run["result"]["sets"]] == [0, 1, 1, 1, 0]
    assert "2 of 5 windows hold none of them" in found.warnings[0]
    assert np.isnan(read_deletions(tmp_path / "out", "substitution").values[:, 1]).all()
    again = run_substitute(dataclasses.replace(config, tuned=str(inputs / "run")))
    np.testing.assert_array_equal(again.scores["substitution"].values, score.values)
    # A checkpoint does not say what was trained, but it shows.
    assert main(["export", f"--run={inputs / 'run'}", f"--out={tmp_path / 'exported'}"]) == 0
    flags = ["substitute", f"--base={inputs / 'base'}", f"--tuned={tmp_path / 'exported'}", "--window=3"]
    assert main([*flags, f"--data={inputs / 'pairs.jsonl'}", f"--out={tmp_path / 'sub'}"]) == 0
    text = capsys.readouterr().out
    assert text.count("untrained") == 2 and "differ in layers 3 alone: 2 of 5 windows" in text
    stored = read_scores(tmp_path / "sub" / "scores.json")["substitution"]
    np.testing.assert_allclose(stored.values, score.values, rtol=1e-6)


def test_a_score_is_not_read_against_the_training_it_chose(inputs, tmp_path, capsys):
    base, data = f"{inputs / 'base'}", f"--data={inputs / 'pairs.jsonl'}"
    an, tuned, sub = (tmp_path / name for name in ("an", "tuned", "sub"))
    assert main(["analyze", f"--model={base}", data, f"--out={an}", "--window=3", "--layers=critical:2"]) == 0
    train = ["finetune", f"--model={base}", data, "--steps=2", "--learning_rate=2e-2"]
    assert main([*train, f"--layers=@{an / 'layers.json'}", f"--out={tuned}"]) == 0
    again = ["substitute", f"--base={base}", f"--tuned={tuned}", data, "--window=3", f"--out={sub}"]
    assert main(again) == 0
    pair = ["correlate", f"--scores={an}:delta", f"--scores={sub}"]
    assert main(pair) == 2
    said = capsys.readouterr().err
    assert "chosen by delta_debiased (critical:2), so the two agree whatever layers" in said and "--layers=all" in said
    assert main(["correlate", f"--all={tmp_path}"]) == 0
    assert "pairs are left out" in capsys.readouterr().out
    assert main(["score", f"--model={tuned}", data, "--criteria=block_influence", f"--out={tmp_path / 'sc'}"]) == 0
    assert "chosen by delta_debiased: its scores show that" in " ".join(capsys.readouterr().out.split())
    assert main([*train, "--layers=all", f"--out={tmp_path / 'all'}"]) == 0
    again[2], again[-1] = f"--tuned={tmp_path / 'all'}", f"--out={tmp_path / 'sub_all'}"
    assert main(again) == 0
    assert main([pair[0], pair[1], f"--scores={tmp_path / 'sub_all'}"]) == 0
    assert "ρ " in capsys.readouterr().out


def test_single_layers_sets_halves_and_the_other_direction_agree(config, tmp_path):
    def losses(**changes):
        name = "-".join(map(str, changes.values()))
        return run_substitute(dataclasses.replace(config, out=str(tmp_path / name), **changes))

    single, named = losses(window=1), losses(sets="0;1;2;3;4;5;6")
    assert named.scores == {}
    np.testing.assert_array_equal(
        [entry["samples"] for entry in named.run["result"]["sets"]], single.scores["substitution"].values
    )
    reverse = losses(reverse=True, window=1)
    assert reverse.scores["substitution_reverse"].direction == "low"
    assert reverse.scores["substitution_reverse"].meta["unchanged"] == reverse.base_loss == single.base_loss
    ends = losses(sets="boundary(1,4-6)").run["result"]["sets"]
    assert [entry["layers"] for entry in ends] == [[1, 6]]
    everything = "first:7"
    forth, back = losses(sets=everything), losses(sets=everything, reverse=True)
    # Blocks of one model with the embedding of the other: neither model's own loss.
    values = [run.run["result"]["sets"][0]["samples"] for run in (forth, back)]
    assert len({*values, forth.base_loss, forth.tuned_loss}) == 4
    attention, mlp = losses(window=1, sites="attn"), losses(window=1, sites="mlp")
    assert set(attention.scores) == {"substitution_attn", "substitution_attn_per_token"}
    assert not np.array_equal(attention.scores["substitution_attn"].values, mlp.scores["substitution_mlp"].values)


def test_same_losses_on_any_mesh(config, tmp_path):
    for mesh in ("data=8", "data=2,fsdp=2,tensor=2"):
        run_substitute(dataclasses.replace(config, mesh=mesh, out=str(tmp_path / mesh)))
    one, other = (losses_of(tmp_path / mesh) for mesh in ("data=8", "data=2,fsdp=2,tensor=2"))
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_base_into_base_is_bit_identical(config, inputs):
    found = run_substitute(dataclasses.replace(config, tuned=config.base, window=1))
    assert (found.scores["substitution"].values == found.base_loss).all() and found.base_loss == found.tuned_loss
    assert "nothing was tuned" in found.warnings[0]


def test_a_finetuning_run_names_the_layer_that_trained(config, inputs):
    found = run_substitute(dataclasses.replace(config, tuned=str(inputs / "run"), window=1))
    values = found.scores["substitution"].values
    assert found.tuned_loss < found.base_loss and values[3] == found.base_loss
    assert np.isnan(np.delete(values, 3)).all()
    losses = np.array([entry["samples"] for entry in found.run["result"]["sets"]])
    assert (np.delete(losses, 3) == found.tuned_loss).all()


def test_an_interrupted_run_goes_on(config, monkeypatch, tmp_path):
    whole = run_substitute(config)
    other = dataclasses.replace(config, out=str(tmp_path / "other"))
    done, sweep = [], sweeps.sample_losses

    def interrupted(examples, batch_size, session, directory, take, *rest):
        def some(batch, rows, step):
            if len(done) == 2:
                raise KeyboardInterrupt
            done.append(1)
            return take(batch, rows, step)

        return sweep(examples, batch_size, session, directory, some, *rest)

    monkeypatch.setattr("jaxcrit.criteria.substitution.sample_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_substitute(other)
    assert (tmp_path / "other" / "partial.npz").exists()
    done.clear()

    def counted(examples, batch_size, session, directory, take, *rest):
        return sweep(examples, batch_size, session, directory, lambda *a: (done.append(1), take(*a))[1], *rest)

    monkeypatch.setattr("jaxcrit.criteria.substitution.sample_losses", counted)
    run_substitute(other)
    assert len(done) == whole.block_evaluations["batches"] - 2 > 0
    np.testing.assert_array_equal(losses_of(tmp_path / "other"), losses_of(tmp_path / "out"))
    first, second = (
        path.read_bytes() for path in (tmp_path / "out" / "scores.json", tmp_path / "other" / "scores.json")
    )
    assert first == second


def test_told_to_leave_it_saves_and_goes_on(config, monkeypatch, tmp_path):
    run_substitute(dataclasses.replace(config, out=str(tmp_path / "whole")))
    sweep = sweeps.sample_losses

    def told(examples, batch_size, session, directory, take, *rest):
        def some(batch, rows, step):
            os.kill(os.getpid(), signal.SIGTERM)
            return take(batch, rows, step)

        return sweep(examples, batch_size, session, directory, some, *rest)

    with monkeypatch.context() as patch, pytest.raises(Preempted, match="told to leave at batch 1 of"):
        patch.setattr("jaxcrit.criteria.substitution.sample_losses", told)
        run_substitute(config)
    assert (tmp_path / "out" / "partial.npz").exists()
    run_substitute(config)
    np.testing.assert_array_equal(losses_of(tmp_path / "out"), losses_of(tmp_path / "whole"))


def test_bad_input(config, inputs, tmp_path):
    def refused(match, **changes):
        with pytest.raises(UserError, match=match):
            run_substitute(dataclasses.replace(config, **changes))
        assert not (tmp_path / "out").exists()

    refused("--tuned: expected the tuned model", tuned="")
    refused("^--tuned=/nowhere: no such directory", tuned="/nowhere")
    refused("^--base=/nowhere: no such directory", base="/nowhere")
    gone = shutil.copytree(inputs / "run", tmp_path / "gone")
    record = json.loads((gone / "run.json").read_text().replace(str(inputs / "base"), "/nowhere"))
    (gone / "run.json").write_text(json.dumps({key: value for key, value in record.items() if key != "digests"}))
    refused("gone: trained on /nowhere: no such directory", tuned=str(gone))
    refused("--window=9: expected an odd number from 1 to the 7 layers", window=9)
    refused("--window=4: expected an odd", window=4)
    refused("--sites=mpl: expected blocks or attn or mlp .did you mean 'mlp'", sites="mpl")
    refused("--sets=critical:2: needs scores", sets="0-2;critical:2")
    refused("--sets=7: ", sets="7")
    refused("--sets=step:2: needs scores", sets="step:2")
    refused("--random=-1", random=-1)
    refused("--batch_size=0", batch_size=0)
    shallow = tiny_checkpoint(tmp_path / "shallow", num_hidden_layers=4)
    refused("one shape, got num_layers 7 in the base, 4 in the tuned model", tuned=str(shallow))
    other = shutil.copytree(inputs / "tuned", tmp_path / "other")
    tokenizer = tiny_tokenizer_dir(tmp_path / "tokenizer")
    text = json.loads((tokenizer / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(text))
    refused("one tokenizer, got two; token '[ab]' is", tuned=str(other))
    silent = tmp_path / "silent.jsonl"
    silent.write_text('{"prompt": "one", "response": "two"}\n{"prompt": "three"}\n')
    refused("row 2 has no response", data=str(silent))


def test_commands(config, inputs, capsys, tmp_path):
    flags = [f"--base={config.base}", f"--tuned={config.tuned}", f"--data={config.data}", f"--out={config.out}"]
    assert main(["substitute", *flags, "--window=3", "--random=5"]) == 0
    shown = capsys.readouterr().out
    assert "32 block evaluations a batch, as many as 4.6 passes of 7 layers" in shown.replace("\n  ", " ")
    assert "5 random sets of 3 layers" in shown and "◀ highest" in shown
    assert max(map(len, shown.splitlines()[:-1])) <= 100
    for name in ("report.html", "substitution.png", "run.json", "scores.json", "substitution.npz", "deletions.npz"):
        assert (tmp_path / "out" / name).exists(), name
    assert "Use these layers" not in (tmp_path / "out" / "report.html").read_text()
    assert main(["substitute", *flags, "--window=2"]) == 2
    out = tmp_path / "ablated"
    assert (
        main(
            [
                "ablate",
                f"--model={config.base}",
                f"--data={config.data}",
                f"--out={out}",
                "--score=generated",
                "--max_new_tokens=4",
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "Most needed: layer" in shown and "63 block evaluations" in shown
    assert set(read_scores(out / "scores.json")) == {
        "ablation_skip",
        "ablation_skip_per_token",
        "ablation_mean",
        "ablation_mean_per_token",
        "ablation_skip_generated",
    }
    assert read_json(out / "run.json", "jaxcrit.run")["status"] == "complete"


def test_ablation(inputs, tmp_path):
    config = AblateOptions(
        model=str(inputs / "base"), data=str(inputs / "pairs.jsonl"), out=str(tmp_path / "out"), sites="mlp"
    )
    found = run_ablate(config)
    assert set(found.scores) == {f"ablation_{m}_mlp{s}" for m in ("skip", "mean") for s in ("", "_per_token")}
    again = run_ablate(config)
    np.testing.assert_array_equal(again.scores["ablation_mean_mlp"].values, found.scores["ablation_mean_mlp"].values)
    with pytest.raises(UserError, match="zeroing the weights is the same as skip"):
        run_ablate(dataclasses.replace(config, methods="skip,zero"))
    with pytest.raises(UserError, match=r"got 'men' .did you mean 'mean'"):
        run_ablate(dataclasses.replace(config, methods="men"))
