"""``jaxcrit remix``: the arithmetic against slow references, and from checkpoints to run directories."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
from support.family_models import one_device
from support.mixtures import answering_mixture, rows_to_answer, write_rows
from support.tiny_model import tiny_checkpoint

import jaxcrit
from jaxcrit.commands.main import main
from jaxcrit.commands.remix import METHODS, RemixOptions, report, run_remix
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_json
from jaxcrit.evidence import rows as kept
from jaxcrit.models.model import open_model
from jaxcrit.parallel.preemption import Preempted
from jaxcrit.studies import remix

RNG = np.random.default_rng(0)


def shares(rows, layers=3, experts=4):
    drawn = RNG.random((rows, layers, experts)).astype(np.float32)
    return drawn / drawn.sum(axis=-1, keepdims=True)


def test_nearest_and_mean_one_by_one():
    one, other, values = RNG.standard_normal((5, 6)), RNG.standard_normal((9, 6)), shares(9)
    near = remix.nearest(remix.squared_distances(one, other), 3)
    mean = remix.averaged(values, near)
    for row in range(5):
        squared = [float(((one[row] - other[column]) ** 2).sum()) for column in range(9)]
        places = sorted(range(9), key=lambda column: squared[column])[:3]
        kernel = [np.exp(-squared[place] / (2 * np.median([squared[p] for p in places]))) for place in places]
        assert near.places[row].tolist() == places
        np.testing.assert_allclose(near.weights[row], np.array(kernel) / sum(kernel), rtol=1e-5)
        expected = sum(k * values[place] for k, place in zip(kernel, places, strict=True)) / sum(kernel)
        np.testing.assert_allclose(mean[row], expected, rtol=1e-5)
    equal = remix.nearest(np.array([[0.0, 0.0, 1.0]]), 3)
    assert equal.places.tolist() == [[0, 1, 2]] and equal.weights.tolist() == [[0.5, 0.5, 0.0]]
    some = near.of([4, 5])  # five rows there are
    assert some.places[0].tolist() == near.places[4].tolist() and some.weights[1].tolist() == [0, 0, 0]


def test_states_are_compared_by_their_direction_from_the_centre():
    states, centre = RNG.standard_normal((4, 6)), RNG.standard_normal(6)
    found = remix.unit(centre + 3 * (states - centre), centre)
    np.testing.assert_allclose(found, remix.unit(states, centre))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)
    assert not remix.unit(centre[None], centre).any()


def test_mode_goes_half_way_again_and_again():
    own, values = shares(2), shares(7)
    expected = own.copy()
    for _ in range(4):
        for row in range(2):
            squared = ((values - expected[row]) ** 2).sum(axis=(1, 2))
            places = np.argsort(squared)[:3]
            kernel = np.exp(-squared[places] / (2 * np.median(squared[places])))
            expected[row] = 0.5 * expected[row] + 0.5 * np.tensordot(kernel / kernel.sum(), values[places], 1)
    np.testing.assert_allclose(remix.mode(own, values, 3, 4), expected, rtol=1e-4)
    fixed = remix.Near(np.array([[1, 2], [3, 4]]), np.full((2, 2), 0.5, np.float32))
    np.testing.assert_allclose(
        remix.mode(own, values, 2, 20, fixed), [values[[1, 2]].mean(axis=0), values[[3, 4]].mean(axis=0)], atol=1e-5
    )


def test_blends_and_the_largest():
    own, mean = shares(2), shares(2)
    np.testing.assert_array_equal(remix.blend(own, mean, 1.0), own)
    found = remix.blend(own, mean, np.array([0.25, 0.0]))
    np.testing.assert_allclose(found, [0.25 * own[0] + 0.75 * mean[0], mean[1]], rtol=1e-6)
    row = np.array([0.1, 0.4, 0.1, 0.4])
    assert remix.largest(row, 1).tolist() == [False, True, False, False], "of equal ones the first"
    assert remix.largest(row, 3).tolist() == [True, True, False, True] and remix.largest(row, 0).all()


def test_random_references_and_layers():
    near = remix.drawn(50, 10, 3, 0)
    assert all(len(set(row)) == 3 for row in near.places.tolist()) and set(near.places.ravel()) == set(range(10))
    np.testing.assert_allclose(near.weights.sum(axis=1), 1, rtol=1e-6)
    assert (near.places != remix.drawn(50, 10, 3, 1).places).any()
    found = {remix.random_layers(3, (1, 2), seed) for seed in range(20)}
    assert found == {(0, 1), (0, 2)} and remix.random_layers(2, (0, 1), 0) == ()


def test_trials_and_what_they_cost():
    names = [one.name for one in remix.trials(METHODS, (5, 6), (0, 3))]
    assert names[:4] == list(METHODS) and len(set(names)) == len(names) == 18
    assert {"oracle", "own shares", "mean of all references", "descent, random references"} <= set(names)
    assert {"mean, random layers", "oracle, random layers"} <= set(names)
    assert not any(name.endswith("random layers") for name in (one.name for one in remix.trials(METHODS, (0, 1), ())))
    few = [one.name for one in remix.trials(METHODS, (5, 6), (0, 3), few=True)]
    assert [name for name in names if name not in few] == [
        "kernel, random references",
        "descent, random references",
        "kernel, random layers",
        "descent, random layers",
        "oracle, random layers",
    ]
    # The rows, as they are and by the mean, once with random references, of all and their own; the oracle's ten steps.
    wanted = remix.trials(["mean"], (5, 6), ())
    assert remix.planned(wanted, 10, 7) == 7 + 2 + 2 * 4 + 2 * (1 + 20)
    assert remix.planned(remix.trials(["kernel"], (5, 6), ()), 10, 7) == 7 * 3 + 2 + 2 * 6 * 2 + 2 * 2 + 2 * 21


def test_told_beside_the_model_as_it_is():
    loss = np.array([[1.0, 2.0, 3.0, 4.0], [0.5, 2.0, 3.0, 4.0]])
    exact = np.array([[0, 1, 0, 1], [1, 1, 1, 0]])
    base, one = remix.told(np.stack([loss, exact, exact]), ["as it is", "other"], 0)
    assert base["exact"] == 0.5 and base["won"] == base["lost"] == 0 and base["loss_change"] == [0, 0, 0]
    assert (one["exact"], one["won"], one["lost"], one["p"]) == (0.75, 2, 1, 1.0)
    assert one["loss_change"][0] == -0.125 and one["loss_change"][1] <= -0.125 <= one["loss_change"][2] == 0
    assert one["exact_change"][0] == 0.25 and not remix.room(one)
    assert remix.room({"won": 8, "lost": 0, "p": 0.008}) and not remix.room({"won": 0, "lost": 8, "p": 0.008})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    answering_mixture(folder / "model")
    write_rows(folder / "reference.jsonl", rows_to_answer(24, wrong=3, seed=1))
    write_rows(folder / "data.jsonl", rows_to_answer(9, wrong=4, seed=2))
    return folder


@pytest.fixture
def config(inputs, tmp_path):
    return RemixOptions(
        model=str(inputs / "model"),
        reference=str(inputs / "reference.jsonl"),
        data=str(inputs / "data.jsonl"),
        layers="0,6",
        seed=1,  # whose random layers begin with 0 too: fewer programs
        method="mean,kernel,mode,descent",
        neighbours=2,
        steps=3,
        at="all",
        batch_size=8,
        mesh="data=4,fsdp=2",
        out=str(tmp_path / "out"),
    )


def test_a_run(config, tmp_path, capsys):
    made = run_remix(config)
    out, found = tmp_path / "out", made.found
    files = {path.name for path in out.iterdir()}
    assert files >= {"remix.json", "remix.jsonl", "report.html", "exact.png", "loss.png"}
    assert not any(name.startswith("partial") for name in files)
    assert found["references"] == {"given": 24, "exact": 21} and found["rows"] == 9
    assert (
        found["base"]["exact"] == pytest.approx(5 / 9)
        and found["layers"] == [0, 6]
        and found["random_layers"] == [0, 5]
        and not found["room"]
    )
    by_name = {one["name"]: one for one in found["variants"]}
    assert set(by_name) >= {*METHODS, *(f"{name}, random references" for name in METHODS), "oracle, random layers"}
    assert by_name["oracle"]["loss_change"][0] < min(by_name[name]["loss_change"][0] for name in METHODS)
    assert all(one["won"] == one["lost"] == 0 for one in found["variants"]), "shares move no answer of this model"
    assert len({one["loss"] for one in found["variants"]}) > 10 and sum(found["blends"].values()) == 9
    lines = made.rows
    assert [line["before"]["exact"] for line in lines] == [False] * 4 + [True] * 5
    assert all(3 <= place < 24 for line in lines for place in line["neighbours"]), "the first three are not exact"
    for name, one in by_name.items():
        assert np.mean([line["after"][name]["loss"] for line in lines]) == pytest.approx(one["loss"])
    text = report(made).text(200)
    assert "No room: descent on each row's own answer, layers 0,6" in text and "21 of 24 rows" in text
    again = run_remix(config)
    assert again.found == read_json(out / "remix.json", "jaxcrit.remix") and report(again).text(200) == text
    assert again.rows == lines
    given = [f"--{name}={getattr(config, name)}" for name in ("model", "data", "reference", "layers", "method", "out")]
    assert main(["remix", *given, "--neighbours=2", "--steps=3", "--at=all", "--seed=1"]) == 0, (
        "batch size is no part of it"
    )
    assert "No room" in capsys.readouterr().out
    (out / "remix.json").write_text((out / "remix.json").read_text().replace('"won"', '"one"', 1))
    with pytest.raises(UserError, match=r"remix\.json: expected .*won"):
        run_remix(config)


def test_devices_and_batches_find_what_one_device_finds(config):
    one = open_model(config.model, mesh=one_device())
    alone = run_remix(dataclasses.replace(config, mesh=""), model=one, keep=False)
    found = run_remix(dataclasses.replace(config, mesh="data=2,fsdp=2,tensor=2", batch_size=4), keep=False)
    for mine, theirs in zip(found.rows, alone.rows, strict=True):
        assert mine["neighbours"] == theirs["neighbours"] and mine["blend"] == theirs["blend"]
        for name, other in theirs["after"].items():
            assert mine["after"][name]["exact"] == other["exact"]
            np.testing.assert_allclose(mine["after"][name]["loss"], other["loss"], atol=1e-5, err_msg=name)


def test_some_experts_alone_move(config):
    """Two of four experts that move leave the rest its mass; of one, nothing can move."""
    one = run_remix(dataclasses.replace(config, method="mean", experts=1, at="last"), keep=False)
    changes = {each["name"]: each["loss_change"][0] for each in one.found["variants"]}
    assert all(abs(change) < 1e-6 for change in changes.values()), changes
    two = run_remix(dataclasses.replace(config, method="mean", experts=2, at="last"), keep=False)
    changes = {each["name"]: each["loss_change"][0] for each in two.found["variants"]}
    assert abs(changes["mean"]) > 1e-6 and changes["own shares"] == 0


def test_told_to_leave_it_saves_and_goes_on(config, monkeypatch, tmp_path):
    config = dataclasses.replace(config, method="mean")
    whole = run_remix(dataclasses.replace(config, out=str(tmp_path / "whole")))
    sweep = kept.sample_losses

    def told(examples, batch_size, model, directory, take, *rest, **more):
        def some(batch, *others):
            os.kill(os.getpid(), signal.SIGTERM)
            return take(batch, *others)

        return sweep(examples, batch_size, model, directory, some, *rest, **more)

    for passes, part in enumerate(("partial_reference.npz", "partial_data.npz", "partial.npz")):
        asked = []

        def some(*given, passes=passes, asked=asked, **more):
            asked.append(more["partial"])
            return (told if len(asked) > passes else sweep)(*given, **more)

        with monkeypatch.context() as patch, pytest.raises(Preempted, match="told to leave at batch 1 of"):
            patch.setattr("jaxcrit.studies.remix.sample_losses", some)
            run_remix(config)
        assert asked[-1] == part and (tmp_path / "out" / part).exists()
    made = run_remix(config)
    assert made.found == whole.found and made.rows == whole.rows
    assert not list((tmp_path / "out").glob("partial*"))


def test_python(inputs):
    model = jaxcrit.load(str(inputs / "model"))
    given = (rows_to_answer(4, seed=2), rows_to_answer(12, seed=1))
    found = jaxcrit.remix(model, *given, layers="0,6", neighbours=1, steps=1, method="mean", controls="few", seed=1)
    assert found.out is None and found.found["layers"] == [0, 6] and len(found.rows) == 4
    with pytest.raises(UserError, match=r"^method=means: expected mean, kernel"):
        jaxcrit.remix(model, *given, method="means")


def test_bad_input(config, inputs, tmp_path):
    def no(message, **changes):
        with pytest.raises(UserError) as caught:
            run_remix(dataclasses.replace(config, **changes))
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    dense = str(tiny_checkpoint(tmp_path / "dense"))
    no("expected a mixture of experts, got a llama model", model=dense)
    no("expected --reference=FILE, rows with responses to learn from", reference="")
    no("--reference: expected 20 rows or more that the model answers exactly", limit=18)
    none = write_rows(tmp_path / "none.jsonl", rows_to_answer(12, wrong=12, seed=1))
    no("10 for each of --neighbours=2; it does 0 of 12", reference=str(none))
    no("--layers=last:9: expected at most 7 layers, got 9", layers="last:9")
    no("--layers=critical:2: ranks layers by a score", layers="critical:2")
    no("--experts=5: the model has 4 experts a layer", experts=5)
    no(
        "--method=mean,best: expected mean, kernel, mode, descent, or several with commas, got 'best'",
        method="mean,best",
    )
    no("--at=first: expected last or all", at="first")
    no("--neighbours=0: expected 1 or more", neighbours=0)
    same = write_rows(tmp_path / "same.jsonl", [*rows_to_answer(24, seed=1), *rows_to_answer(1, seed=2)])
    no("holds the prompt of 1 rows of --data, which would be looking up the answer: row 1 (25", reference=str(same))
    silent = tmp_path / "silent.jsonl"
    silent.write_text("".join(json.dumps({"prompt": f"one {row}"}) + "\n" for row in range(5)))
    no("has no response to learn from", data=str(silent))
    no("has no response to learn from", reference=str(silent))
    no("--model=/nowhere: no such directory", model="/nowhere")
