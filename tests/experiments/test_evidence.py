"""The experiments of docs/evidence.md: the pooled test against loops, cells that resume, planted answers."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import cells
import evidence_report
import evidence_table2
import numpy as np
import pooled_test
import pytest
import selection_regret
import tangent_kernel
from support.tiny_model import tiny_checkpoint

from jaxcrit.core.errors import UserError
from jaxcrit.core.files import json_lines, read_json, write_json
from jaxcrit.core.groups import FinetuneOptions
from jaxcrit.core.layers import LayerScores, write_scores
from jaxcrit.criteria.registry import parse_criteria
from jaxcrit.data.demo import generate
from jaxcrit.evidence.backward import response_gradients
from jaxcrit.models.model import open_model
from jaxcrit.selection.correlation import partial_given_depth

LAYERS = np.arange(2, 28)


@pytest.fixture
def planted():
    return pooled_test.plant(pooled_test.World(0.5), np.random.default_rng(0))


def residual(values):
    """Ranks less their straight line in depth, by least squares; of length 1."""
    ranks = np.argsort(np.argsort(values)).astype(float)
    left = ranks - np.polyval(np.polyfit(LAYERS, ranks, 1), LAYERS)
    return left / np.sqrt((left**2).sum())


def test_the_pooled_test_is_its_definition(planted):
    scores, losses = planted
    found = pooled_test.pooled(scores, losses, LAYERS)
    every = []
    for shift in range(26):
        for back in (1, -1):
            cells_of = [
                [residual(x) @ np.roll(residual(y), shift)[::back] for y in seeds]
                for x, seeds in zip(scores, losses, strict=True)
            ]
            every.append(np.mean(cells_of))
    assert found.statistic == pytest.approx(every[0], abs=1e-12)
    assert found.p == np.mean(np.abs(every) >= abs(every[0]) - 1e-9) and found.floor == 1 / 52
    assert found.by_dataset == pytest.approx(
        [np.mean([partial_given_depth(x, y)[0] for y in seeds]) for x, seeds in zip(scores, losses, strict=True)]
    )


def test_a_curve_against_itself_reaches_the_floor_and_its_opposite_is_against_the_claim(planted):
    scores, _ = planted
    same = pooled_test.pooled(scores, scores[:, None], LAYERS)
    assert same.statistic == pytest.approx(1) and same.p == same.floor
    assert pooled_test.verdict(same).startswith("for the claim") and "not excluded" in pooled_test.verdict(same)
    other = pooled_test.pooled(scores, -scores[:, None], LAYERS)
    assert other.statistic == pytest.approx(-1) and pooled_test.verdict(other).startswith("against the claim")
    assert "is excluded" in pooled_test.verdict(other)


def test_a_score_that_is_all_depth_has_no_verdict_for_it(planted):
    found = pooled_test.pooled(np.tile(LAYERS, (5, 1)), planted[1], LAYERS)
    assert np.isnan(found.statistic) and np.isnan(found.p) and pooled_test.verdict(found).startswith("undecided")


def test_the_joint_test_holds_its_level_where_cells_taken_for_independent_do_not():
    rates = pooled_test.rates(pooled_test.World(), 200, seed=0)
    assert rates["at 0.02"] < 0.08 and rates["t, cells"] > 0.3
    assert pooled_test.rates(pooled_test.World(0.9), 20, seed=0)["for the claim"] > 0.8


def test_cells_are_made_once_and_refuse_other_settings(tmp_path):
    made = cells.Cells.open(tmp_path, {"steps": 3, "seeds": (1, 2)})

    def broken():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made("one", broken)
    assert not (tmp_path / "cells").exists()
    assert made("one", lambda: {"loss": float("nan")}) == {"loss": None}
    before = (tmp_path / "cells" / "one.json").read_bytes()
    again = cells.Cells.open(tmp_path, {"steps": 3, "seeds": (1, 2)})
    assert again("one", broken) == {"loss": None} and (tmp_path / "cells" / "one.json").read_bytes() == before
    spent = again.spent()
    assert list(spent["seconds"]) == ["one"] and spent["peak_gib"] > 0.01
    with pytest.raises(UserError, match="was begun with steps 3, now 4"):
        cells.Cells.open(tmp_path, {"steps": 4, "seeds": (1, 2)})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model of ten layers, and rows of two families."""
    folder = tmp_path_factory.mktemp("evidence")
    tiny_checkpoint(folder / "model", num_hidden_layers=10, max_position_embeddings=512)
    for family in ("closed", "order"):
        for split in ("train", "test"):
            rows = generate(family, 20, split=split)
            (folder / f"{family}_{split}.jsonl").write_text(
                json_lines([*rows, {"prompt": "no answer", "response": " "}])
            )
    return folder


def test_rows_without_a_response_or_too_long_are_left_out(tiny, tmp_path):
    model = open_model(str(tiny / "model"))
    data, digest = cells.fitting(model, str(tiny / "closed_train.jsonl"), 99, 150, tmp_path)
    kept = [json.loads(line) for line in Path(data).read_text().splitlines()]
    assert 0 < len(kept) < 20 and all(row["response"].strip() for row in kept)
    assert cells.fitting(model, str(tiny / "closed_train.jsonl"), 99, 150, tmp_path) == (data, digest)
    assert (
        len(Path(cells.fitting(model, str(tiny / "closed_train.jsonl"), 2, 512, tmp_path)[0]).read_text().splitlines())
        == 2
    )
    with pytest.raises(UserError, match="expected rows as JSON lines"):
        cells.fitting(model, str(tiny / "none.jsonl"), 2, 512, tmp_path)


def table2(tiny, out, *more):
    rows = [f"--model={tiny}/model", f"--data={tiny}/closed_train.jsonl", f"--test_data={tiny}/closed_test.jsonl"]
    little = "--seeds=1 --steps=2 --long_steps=4 --rows=16 --tests=4 --prompts=12 --scored=4 --length=512 --windows=5,1"
    return evidence_table2.main([*rows, f"--out={out}", *little.split(), "--batch_size=8", *more])


def test_every_score_of_the_model_is_taken(tiny, tmp_path):
    given = argparse.Namespace(model=str(tiny / "model"), mesh="", prompts=12, scored=4, batch_size=4)
    data, _ = cells.fitting(open_model(given.model), str(tiny / "closed_train.jsonl"), 12, 512, tmp_path / "rows")
    made = evidence_table2.base_scores(given, {"prompts": data, "train": data}, tmp_path)
    found, left_out = made["scores"], {text.partition(":")[0] for text in made["left_out"] if "is left out" in text}
    wanted = {*evidence_table2.CURVES, "ablation_skip", "ablation_mean", *parse_criteria("", two_models=False)}
    wanted -= {"routing_sensitivity"}  # of mixtures
    assert set(found) | left_out == wanted and left_out <= {"cluster_nmi", "cluster_step", "cohesion_rise"}
    assert all(len(one["values"]) == 10 for one in found.values()) and found["delta"]["meta"] == {"window": 5}


@pytest.fixture
def scores(monkeypatch):
    """Scores that cost nothing stand for those of the model."""
    rng, made = np.random.default_rng(0), {}
    for key in evidence_table2.CURVES:
        valid = np.arange(10) if key.startswith("step") else np.arange(2, 8)
        score = LayerScores(key, rng.normal(size=10), np.isin(np.arange(10), valid), "low", meta={"window": 5})
        made[key] = score.to_json()
    monkeypatch.setattr(evidence_table2, "base_scores", lambda *_: {"scores": made, "left_out": []})


def test_table_2_goes_on_after_an_interruption_with_the_same_bytes(tiny, scores, tmp_path, monkeypatch, capsys):
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    assert table2(tiny, whole) == 0
    text = capsys.readouterr().out
    assert (
        "the registered test is not made" in text and "2 steps reach" in text and "delta_debiased, closed_train" in text
    )
    assert max(map(len, text.splitlines())) <= 100
    substitute = evidence_table2.run_substitute
    calls = []

    def interrupted(options):
        calls.append(options)
        if len(calls) == 2:  # the first cell's second window
            raise KeyboardInterrupt
        return substitute(options)

    monkeypatch.setattr(evidence_table2, "run_substitute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        table2(tiny, halted)
    monkeypatch.setattr(evidence_table2, "run_substitute", substitute)
    assert table2(tiny, halted, "--minutes=0.00001") == 0  # what is there is told, nothing is begun
    assert "no cell is complete yet" in capsys.readouterr().out
    assert table2(tiny, halted) == 0
    names = sorted(path.name for path in (whole / "cells").iterdir())
    assert names == ["base-closed_train.json", "cell-closed_train-1.json", "long-closed_train.json"]
    for name in names:
        assert (halted / "cells" / name).read_bytes() == (whole / "cells" / name).read_bytes()
    assert not list((halted / "runs").iterdir())  # the scores were put in by hand
    capsys.readouterr()
    assert evidence_table2.main([f"--read={whole}/evidence_table2.json"]) == 0
    assert capsys.readouterr().out == text
    remade = whole / "cells" / "cell-closed_train-1.json"
    here = remade.read_text()
    remade.unlink()
    assert table2(tiny, whole, "--mesh=data=4,fsdp=2") == 0  # made anew elsewhere
    numbers = [re.findall(r"-?\d[\d.e+-]*", text) for text in (here, remade.read_text())]
    np.testing.assert_allclose(*(np.array(found, float) for found in numbers), rtol=1e-4, atol=1e-6)
    assert table2(tiny, whole, "--mesh=fsdp=3") == 2 and "--mesh" in capsys.readouterr().err
    assert table2(tiny, whole, "--steps=3") == 2 and "was begun with steps 2, now 3" in capsys.readouterr().err
    other = tiny_checkpoint(tmp_path / "other", seed=1, num_hidden_layers=10, max_position_embeddings=512)
    assert table2(tiny, whole, f"--model={other}") == 2 and "was begun with model_hash" in capsys.readouterr().err
    assert table2(tiny, whole, f"--model={tmp_path}/none") == 2


def test_only_planted_layers_have_gradients(tmp_path):
    """So a set without them cannot move; ``.ci/full`` trains the sets (``--known``)."""
    model = open_model(str(selection_regret.plant(tmp_path / "planted")))
    path = tmp_path / "rows.jsonl"
    path.write_text(json_lines(generate(selection_regret.FAMILY, 2)))
    (dataset,) = model.read(FinetuneOptions(data=str(path)), responses=True)
    found = response_gradients(model, model.decoder(), dataset.examples, 2, per_sample=True).total
    assert len(found) == selection_regret.KEPT
    assert tuple(np.flatnonzero(found)) == selection_regret.ALIVE


def test_kernels_are_compared_over_a_training(tiny, tmp_path, capsys):
    rng = np.random.default_rng(0)
    made = {
        key: LayerScores(key, rng.normal(size=10), np.arange(10) > 2, "low")
        for key in ("delta", "delta_debiased", "step")
    }
    write_scores(tmp_path / "scores.json", made)
    rows = [f"--data={tiny}/closed_train.jsonl", f"--test_data={tiny}/closed_test.jsonl"]
    given = [f"--model={tiny}/model", *rows, f"--scores={tmp_path}/scores.json", f"--out={tmp_path}/out"]
    little = "--seeds=1 --steps=1 --rows=8 --tests=3 --kernel_rows=2 --length=512 --batch_size=8"
    assert tangent_kernel.main([*given, *little.split()]) == 0
    told = capsys.readouterr().out
    assert "delta, change, seed 1" in told and "step, turn, seed 1" in told
    assert tangent_kernel.main([*given, *little.split()]) == 0 and capsys.readouterr().out == told  # from its cells


def test_scores_of_another_depth_or_model_are_refused(tiny, tmp_path, capsys):
    def refused(depth, meta):
        score = LayerScores("mine", np.arange(float(depth)), np.full(depth, True), "low", meta=meta)
        write_scores(tmp_path / "scores.json", {"mine": score})
        data = [f"--data={tiny}/closed_train.jsonl", f"--test_data={tiny}/closed_test.jsonl", f"--out={tmp_path}/out"]
        given = [f"--model={tiny}/model", f"--scores={tmp_path}/scores.json", "--arms=mine", *data]
        assert selection_regret.main(given) == 2
        return capsys.readouterr().err

    assert "scores of 12 layers, but the model has 10" in refused(12, {})
    assert "is of model 0123456789ab" in refused(10, {"model_hash": "0123456789abcdef"})
    assert not (tmp_path / "out").exists()


def made_up(losses, **settings):
    """Content of an experiment: random sets first, then the named ones."""
    found = [
        {"arm": arm, "layers": [place, place + 1], "seed": 0, "steps": steps, "before": 9.0, "loss": loss}
        for place, (arm, loss, steps) in enumerate(losses)
    ]
    basis = {"steps": 40, "random": 4, "count": 2, "seeds": 1, "again_steps": 0, "again_sets": 0}
    return {"settings": {**basis, **settings}, "cells": found, "planned": len(found), "time": {"seconds": {}}}


def test_percentile_and_regret():
    assert selection_regret.percentile(2.0, [1.0, 2.0, 3.0, 4.0]) == 0.625
    random = [(f"random {draw}", 1.0 + draw, 40) for draw in range(4)]
    text = selection_regret.report(made_up([*random, ("random 4", 2.5, 40), ("good", 0.5, 40), ("bad", 9.5, 40)]))
    good, bad = (
        next(line.split() for line in text.splitlines() if line.endswith(f"  {arm}")) for arm in ("good", "bad")
    )
    assert good[:2] == ["0.5000", "100"] and good[5:7] == ["0.200", "0.0000"]
    assert bad[1] == "0" and bad[5:7] == ["1.000", "9.0000"]
    assert "1 held-out random sets: percentiles 50" in text and "resolved to ± 25 points" in text


def test_tangent_kernels_are_the_jacobian_by_itself():
    rng = np.random.default_rng(0)
    jacobian = {"a": rng.normal(size=(5, 3, 4, 2)), "b": rng.normal(size=(5, 3, 6))}  # rows, layers, weights
    whole = np.concatenate([one.reshape(5, 3, -1) for one in jacobian.values()], axis=2)
    for block in (1, 2, 5):
        found = tangent_kernel.kernels(lambda row: {name: one[row] for name, one in jacobian.items()}, 5, block)
        assert np.allclose(found, np.einsum("ilw,jlw->lij", whole, whole), rtol=1e-4, atol=1e-4)
    assert np.allclose(tangent_kernel.change(found, 3 * found), 2)
    assert np.allclose(tangent_kernel.turn(found, 3 * found), 0) and np.allclose(tangent_kernel.turn(found, -found), 2)


def test_tangent_kernels_of_a_model_are_those_of_its_gradients(tiny, tmp_path):
    """The trace holds squares of single rows' gradients; the sum of all entries is the square of all rows' together."""
    model = open_model(str(tiny / "model"))
    data, _ = cells.fitting(model, str(tiny / "closed_test.jsonl"), 3, 512, tmp_path)
    found = tangent_kernel.of_model(model, data, 3, 2)
    (dataset,) = model.read(FinetuneOptions(data=data, limit=3), responses=True)
    rows = dataset.examples
    alone = response_gradients(model, model.decoder(), rows, 3, per_sample=True)
    assert np.allclose(np.einsum("lnn->nl", found), alone.samples, rtol=1e-3)
    tokens = sum(len(row.token_ids) - row.prompt_length for row in rows)
    assert np.allclose(found.sum(axis=(1, 2)), (alone.total * tokens) ** 2, rtol=1e-3)


def test_the_page_is_what_the_kept_results_print():
    page = Path(__file__).parents[2] / "docs" / "evidence.md"
    text = page.read_text(encoding="utf-8")
    assert evidence_report.updated(text) == text, "python experiments/evidence_report.py docs/evidence.md"
    assert all(f"<!-- begin: {name} -->" in text for name in evidence_report.PARTS)


def test_what_commands_left_is_kept_with_its_minutes_and_without_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence_report, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    runs = tmp_path / "runs"
    part = evidence_report.PARTS["freezing"]
    assert part.content() is None and not part.keep(runs)
    for one in ("freezing", "regret-dolly"):
        (runs / one).mkdir(parents=True)
    write_json(runs / part.made, part.kind, {"determines": {"model": f"{tmp_path}/SmolLM2.gguf"}})
    write_json(
        runs / part.made.replace("backdoor.json", "run.json"),
        "jaxcrit.run",
        {"time": {"seconds": 90.0, "peak_gib": 4.25}},
    )
    regret = evidence_report.PARTS["regret on dolly"]
    write_json(runs / regret.made, regret.kind, {"time": {"seconds": {"one": 60.0, "other": 120.0}}})  # of old
    assert part.keep(runs) and regret.keep(runs)
    assert part.content()["determines"] == {"model": "SmolLM2.gguf"}
    told = evidence_report.minutes_table({}).splitlines()
    assert [line.split()[:3] for line in told if "freezing" in line or "dolly" in line] == [
        ["22", "3", "-"],
        ["55", "2", "4.2"],
    ]
    assert told[-1].split()[1] in ("4", "5")  # 4.5


def test_long_parts_run_in_little(tmp_path, monkeypatch):
    """Each long program has such a command, and what was kept of them is under ten minutes each."""
    long = {part.made_by.split(" ", 2)[1] for part in evidence_report.PARTS.values() if part.minutes > 10}
    little = {name: part for name, part in evidence_report.PARTS.items() if part.little}
    assert long == {part.made_by.split(" ", 2)[1] for part in little.values()}
    kept = read_json(evidence_report.RESULTS / "evidence_little.json", evidence_report.LITTLE)["spent"]
    assert set(kept) == set(little) and all(one["seconds"] < 600 for one in kept.values())

    program = tmp_path / "experiments" / "echo.py"
    program.parent.mkdir()
    program.write_text("import sys; out = sys.argv[-1].partition('=')[2]; open(out, 'w').write(' '.join(sys.argv[1:]))")
    made_by = f"python experiments/echo.py --data='a b' --steps=9{evidence_report.NEXT}--out=runs/echo"
    part = evidence_report.Part("", "", lambda _: "", made_by, 20, little="--quick --steps=2")
    monkeypatch.setattr(evidence_report, "HOME", program.parent)
    monkeypatch.setattr(evidence_report, "PARTS", {"an echo": part})
    monkeypatch.setattr(evidence_report, "RESULTS", tmp_path)
    evidence_report.run_in_little(tmp_path)
    (spent,) = read_json(tmp_path / "evidence_little.json", evidence_report.LITTLE)["spent"].values()
    assert spent["seconds"] > 0 and spent["peak_gib"] > 0
    said = f"--data=a b --quick --steps=2 --out={tmp_path}/an-echo"
    assert (tmp_path / "an-echo").read_text() == said
    program.write_text("raise SystemExit(3)")
    with pytest.raises(UserError, match="an echo, in little: expected exit 0, got 3"):
        evidence_report.run_in_little(tmp_path)
