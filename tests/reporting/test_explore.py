"""The explorer's page: every number is that of the files, and nothing but what was put there may run."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import html
import json
import re
import shutil
import sys

import numpy as np
import pytest
from scipy.stats import spearmanr
from support.explored import write_run

from jaxcrit.commands.main import main
from jaxcrit.core.files import write_json, write_npz
from jaxcrit.core.layers import read_scores
from jaxcrit.core.selections import LayerSpec, resolve, span
from jaxcrit.reporting import explore
from jaxcrit.reporting.explore_reading import read_runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two of one model, one of another depth."""
    folder = tmp_path_factory.mktemp("runs")
    made = [("a", 16, "alpaca", "small"), ("b", 16, "dolly", "small"), ("c", 24, "alpaca", "large")]
    return [
        write_run(folder / name, num_layers=depth, seed=seed, dataset=rows, model=model)
        for seed, (name, depth, rows, model) in enumerate(made)
    ]


@pytest.fixture(autouse=True)
def no_library(monkeypatch):
    """These tests look at what is in the page, not at what draws it."""
    monkeypatch.setattr(explore, "_vega", lambda: "window.vegaEmbed = null;")


def element(page: str, kind: str, id: str) -> str:
    return re.search(rf'<script type="application/{kind}" id="{id}">(.*?)</script>', page, re.S)[1]


def unpacked(page: str, id: str) -> str:
    return gzip.decompress(base64.b64decode(element(page, "gzip", id))).decode()


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explore, "_vega", lambda: "window.vegaEmbed = null;")
        assert main(["explore", *map(str, runs), f"--out={out}"]) == 0
    return out.read_text(encoding="utf-8")


def files(run):
    return json.loads((run / "scores.json").read_text())["scores"], np.load(run / "cka.npz")


def test_every_number_is_that_of_the_files(runs, page):
    data, cka = json.loads(element(page, "json", "data")), json.loads(unpacked(page, "pairs"))
    assert [(one["source"], one["criterion"]) for one in data["series"]] == [
        (place, key) for place, run in enumerate(runs) for key in files(run)[0]
    ]
    for one in data["series"]:
        scores, arrays = files(runs[one["source"]])
        mine = scores[one["criterion"]]
        assert one["value"] == mine["values"] and one["stderr"] == (mine["stderr"] or [])
        assert (one["direction"], one["bias"], one["num_layers"]) == ("low", mine["meta"]["bias"], len(mine["values"]))
        beside, spread = null_of(one, arrays)
        np.testing.assert_allclose(numbers(one["reference"]), beside, rtol=1e-12)
        np.testing.assert_allclose(numbers(one["stddev"]), spread, rtol=1e-12)
    for place, run in enumerate(runs):
        arrays = files(run)[1]
        for name in ("biased", "debiased"):
            rows = cka[str(place)][name]
            assert [row[column] for row in rows for column in range(len(row))] == [
                arrays[name][row, column] for row in range(len(rows)) for column in range(row + 1)
            ]
            assert np.array_equal(arrays[name], arrays[name].T)


def test_cka_between_two_models_is_kept_whole(tmp_path):
    matrix = np.random.default_rng(0).uniform(size=(16, 20))
    write_run(tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    arrays = dict.fromkeys(("biased", "debiased", "null_mean"), matrix)
    write_npz(tmp_path / "run" / "cka.npz", arrays, {"format": "jaxcrit.cka", "format_version": 1})
    (source,) = read_runs([str(tmp_path / "run")])
    scores = {key: one for key, one in source.scores.items() if "debiased" in key}
    data = explore.page_data([dataclasses.replace(source, scores=scores)], trim=2)
    assert data["cka"]["0"]["biased"] == matrix.tolist()


def numbers(column):
    return [np.nan if one is None else one for one in column]


def null_of(one, arrays):
    """Mean and largest standard deviation of the null of a score, by its definition; nothing of debiased ones."""
    if one["bias"] == "debiased":
        return [], []
    mean, spread, depth = arrays["null_mean"], arrays["null_stddev"], one["num_layers"]
    found = np.full((2, depth), np.nan)
    for layer in range(depth):
        if one["criterion"] == "step" and layer:
            found[:, layer] = mean[layer - 1, layer], spread[layer - 1, layer]
        if one["criterion"] == "delta" and 2 <= layer < depth - 2:
            near = [other for other in range(layer - 2, layer + 3) if other != layer]
            found[:, layer] = (1 + sum(mean[layer, near])) / 5, sum(spread[layer, near]) / 5
    return found


def test_the_order_of_layers_is_that_of_selections(runs, page):
    for one in json.loads(element(page, "json", "data"))["series"]:
        scores = read_scores(runs[one["source"]] / "scores.json")[one["criterion"]]
        assert len(one["ranking"]) == scores.valid[2:-2].sum()
        for count in range(1, len(one["ranking"]) + 1):
            chosen = resolve(LayerSpec("critical", count), one["num_layers"], scores=scores)
            assert sorted(one["ranking"][:count]) == list(chosen.layers)
        assert [one["place"][layer] for layer in one["ranking"]] == list(range(1, len(one["ranking"]) + 1))


def test_agreement_is_rank_correlation_within_a_depth(page):
    data = json.loads(element(page, "json", "data"))
    assert [{data["series"][id]["num_layers"] for id in group["ids"]} for group in data["agreement"]] == [{16}, {24}]
    for group in data["agreement"]:
        for i, row in enumerate(group["rho"]):
            for j, rho in enumerate(row):
                a, b = (np.array(numbers(data["series"][group["ids"][place]]["value"])) for place in (i, j))
                both = np.isfinite(a) & np.isfinite(b)
                assert rho == pytest.approx(spearmanr(a[both], b[both])[0], abs=1e-12)


def test_a_score_that_chose_what_was_trained_agrees_with_nothing(tmp_path):
    run = write_run(tmp_path / "run")
    content = json.loads((run / "scores.json").read_text())
    content["scores"]["step"]["meta"]["trained"] = {"layers": [1], "criteria": ["delta"], "rules": ["critical:1"]}
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "scores.json").write_text(json.dumps(content))
    data = explore.page_data(read_runs([str(tmp_path / "apart")]), trim=2)
    keys = [one["criterion"] for one in data["series"]]
    rho = data["agreement"][0]["rho"]
    assert [[a, b] for i, a in enumerate(keys) for j, b in enumerate(keys[: i + 1]) if rho[i][j] is None] == [
        ["step", "delta"],
        ["step", "delta_debiased"],
    ]


def test_nothing_but_what_was_put_there_may_run(page):
    policy = html.unescape(re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1])
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and "unsafe" not in policy
    script = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert len(script) == 1
    hashes = [hashed(script[0]), hashed(unpacked(page, "vega"))]
    assert rules["script-src"].split() == hashes
    assert rules["style-src"] == hashed(re.search(r"<style>(.*?)</style>", page, re.S)[1])
    assert not re.search(r"\b(src|href)=\"(?!#)", page) and " style=" not in page and " onclick=" not in page


def hashed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_a_model_too_small_for_a_choice_is_shown(tmp_path):
    (source,) = read_runs([str(write_run(tmp_path / "run", num_layers=8))])
    rows = explore.index_rows([dataclasses.replace(source, chosen=None)], trim=4)
    assert {(row["layers"], row["sure"]) for row in rows} == {("-", "fewer than 1 layers may be chosen")}
    assert all(one["ranking"] == [] for one in explore.page_data([source], trim=4)["series"])
    assert 'max="1"' in explore.explorer_page([source], trim=4)


def test_names_from_files_are_text(tmp_path):
    run = write_run(tmp_path / "run", dataset="<img src=x>&amp;", model="</script><b>")
    sources = read_runs([str(run)])
    page = explore.explorer_page(sources)
    assert "<img" not in page and "<b>" not in page and "</script><" not in page.replace("</script>\n", "")
    one = json.loads(element(page, "json", "data"))["series"][0]
    assert (one["dataset"], one["model"]) == ("<img src=x>&amp;", "script><b>")
    assert explore.explorer_page(sources) == page, "same input, same bytes"


def test_what_is_said_of_depths_and_of_matrices_left_out(runs, page, monkeypatch):
    assert "Models of 16, 24 layers stand side by side: layer n of one is not layer n of another" in page
    assert "is left out" not in page
    sources = read_runs(list(map(str, runs)))
    size = len(page.encode())
    monkeypatch.setattr(explore, "LARGEST", size - 1)
    smaller = explore.explorer_page(sources)
    assert "CKA of 1 of these is left out" in smaller and len(smaller.encode()) < size
    assert json.loads(unpacked(smaller, "pairs")).keys() == {"0", "1"}
    monkeypatch.setattr(explore, "LARGEST", 20_000)
    with pytest.raises(
        explore.UserError, match=r"at most 20,000 bytes, got [\d,]+ of 3 runs and 12 scores; give fewer"
    ):
        explore.explorer_page(sources)
    assert "side by side" not in explore.explorer_page.__doc__ and "Models of" not in explore.depths(sources[:2])


def with_file(name, form, content, version=1):
    def damage(run):
        write_json(run / name, form, content)
        text = (run / name).read_text().replace('"format_version": 1', f'"format_version": {version}')
        (run / name).write_text(text)
        (run / "run.json").unlink()

    return damage


UNSURE = {"criterion": "delta", "rule": "x"}
CHOICE = {"num_prompts": 3, "selection_probability": [1.0], "confidence_set": {"level": 0.95, "layers": [2]}}
LAYERS = {"layers": [1], "criterion": "delta", "rule": "critical:1", "num_layers": 9, "model_hash": None}
DAMAGES = {
    "scores of another version": (
        with_file("scores.json", "jaxcrit.scores", {"num_layers": 1, "scores": {}}, 2),
        "scores.json: expected format_version 1, got 2; upgrade jaxcrit",
    ),
    "a choice of another model": (
        with_file("layers.json", "jaxcrit.layers", LAYERS),
        "layers.json: expected layers of 16, as scores.json beside it has, got of 9",
    ),
    "probabilities of another model": (
        with_file("uncertainty.json", "jaxcrit.uncertainty", {**UNSURE, "choice": CHOICE}),
        "uncertainty.json: expected selection_probability of 16 layers, got 1",
    ),
    "a choice without its prompts": (
        with_file("uncertainty.json", "jaxcrit.uncertainty", {**UNSURE, "choice": {}}),
        "uncertainty.json: expected choice.confidence_set to be a JSON object, got nothing",
    ),
    "no scores": (lambda run: (run / "scores.json").unlink(), "run: holds no scores.json, which jaxcrit analyze does"),
    "scores that were changed": (
        lambda run: (run / "scores.json").write_text((run / "scores.json").read_text().replace("low", "high", 1)),
        "scores.json: is not the file that its run wrote",
    ),
    "no run": (lambda run: shutil.rmtree(run), "run: no such run directory"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_run_that_cannot_be_shown_is_one_line(name, tmp_path, capsys):
    damage, message = DAMAGES[name]
    damage(write_run(tmp_path / "run"))
    refused(["explore", str(tmp_path / "run"), f"--out={tmp_path / 'page.html'}"], message, capsys)
    assert not (tmp_path / "page.html").exists()


def refused(words, message, capsys):
    capsys.readouterr()
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("jaxcrit: error: ") and err.count("\n") == 1 and message in err, err


def test_what_is_asked_wrongly_is_one_line(runs, tmp_path, capsys, monkeypatch):
    run, copy = str(runs[0]), tmp_path / "copy"
    shutil.copytree(run, copy)
    out = f"--out={tmp_path / 'page.html'}"
    refused(["explore", out], "expected jaxcrit explore RUN", capsys)
    refused(["explore", run, f"--index={run}", out], "or --index=DIR in their place", capsys)
    refused(["explore", run], "expected --out=page.html", capsys)
    refused(["explore", run, "--out=gs:/x/y"], "cannot be written", capsys)
    refused(["explore", run, run, out], f"{run}: is {run} once more; give each run once", capsys)
    refused(["explore", run, f"{run}/scores.json", out], "once more", capsys)
    refused(["explore", run, str(copy), out], f"{copy}: is {run} once more", capsys)
    refused(["explore", f"{run}/run.json", out], "run.json: expected a run directory, or its scores.json", capsys)
    refused(["explore", f"--index={tmp_path / 'absent'}", out], "expected a directory", capsys)
    (tmp_path / "empty").mkdir()
    refused(["explore", f"--index={tmp_path / 'empty'}", out], "expected scores.json in it or below", capsys)
    refused(["explore", run, f"--out={tmp_path}"], "is there already; choose another name", capsys)
    record = json.loads((copy / "run.json").read_text())
    write_json(copy / "run.json", "jaxcrit.run", {"command": record["command"], "status": "running"})
    refused(["explore", str(copy), out], "copy: is not complete; give the same jaxcrit analyze again", capsys)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    refused(["explore", run, out], "explore: needs vl-convert-python: pip install 'jaxcrit[explore]'", capsys)


def several(record):
    kept = {key: value for key, value in record.items() if key not in ("digests", "format", "format_version")}
    return {**kept, "data": {"one": {}, "two": {}}}


def test_a_run_of_several_datasets_is_shown_with_what_they_have_in_common(tmp_path):
    """As `analyze` leaves one: a folder each, and the consensus above them, which is no dataset of its own."""
    run = write_run(tmp_path / "run")
    for name in ("one", "two"):
        write_run(run / name, dataset=name, seed=len(name))
        (run / name / "run.json").unlink()
    record = json.loads((run / "run.json").read_text())
    write_json(run / "run.json", "jaxcrit.run", several(record))
    found = read_runs([str(run)])
    assert [(one.name, one.dataset) for one in found] == [("one", "one"), ("two", "two"), ("run", "all 2")]
    (alone,) = read_runs([str(run / "two")])
    assert (alone.dataset, alone.command, alone.model) == ("two", "analyze", "small")
    write_run(run / "other")
    (run / "other" / "run.json").unlink()
    (other,) = read_runs([str(run / "other" / "scores.json")])
    assert (other.dataset, other.command) == ("alpaca", ""), "what lies in a run need not be of it"


def test_runs_come_from_a_bucket_and_pages_go_to_one(storage, runs, page):
    held = storage.buckets["bucket"]
    for run in runs:
        held |= {f"runs/{run.name}/{one.name}": (1, one.read_bytes()) for one in run.iterdir()}
    assert main(["explore", *(f"gs://bucket/runs/{run.name}" for run in runs), "--out=gs://bucket/page.html"]) == 0
    assert held["page.html"][1].decode() == page
    assert main(["explore", "--index=gs://bucket/runs", "--out=gs://bucket/index.html"]) == 0
    assert '<a href="runs/a/scores.json">a</a>' in held["index.html"][1].decode()
    assert main(["explore", "gs://bucket/runs/a", "--out=gs://bucket/page.html"]) == 2, "is there already"
    assert main(["explore", "gs://bucket/runs/a", "--out=gs://sealed/page.html"]) == 2, "cannot be written"


def test_an_index_is_a_row_for_each_choice(runs, tmp_path):
    folder = tmp_path / "shared"
    for run in runs:
        shutil.copytree(run, folder / run.name)
    (folder / "b" / "layers.json").unlink()
    (folder / "a" / "report.html").write_text("")
    out = tmp_path / "pages" / "index.html"
    out.parent.mkdir()
    assert main(["explore", f"--index={folder}", f"--out={out}"]) == 0
    page = out.read_text()
    assert "<script" not in page and "default-src 'none'" in html.unescape(page)
    rows = [re.sub(r"<[^>]+>", "|", row) for row in re.findall(r"<tr><td>.*?</tr>", page)]
    assert len(rows) == 1 + 4 + 1, "one for what a run chose, one for every score where it chose nothing"
    digest = hashlib.sha256((folder / "a" / "scores.json").read_bytes()).hexdigest()
    for part in ("a|, jaxcrit analyze", "small, 16 layers", "alpaca", "delta_debiased", "(critical:2)", digest[:12]):
        assert part in rows[0]
    first, second = json.loads((folder / "a" / "layers.json").read_text())["layers"][:2]
    assert "each in at least 93% of draws of 300 prompts" in rows[0]
    assert f"the most critical one is one of {span([first, second])} at 95%" in rows[0]
    assert all("not estimated" in row for row in rows[1:5])
    for link in re.findall(r'href="([^"]+)"', page):
        assert (out.parent / link).exists(), link
    assert len(set(re.findall(r'href="([^"]+)"', page))) == 3
