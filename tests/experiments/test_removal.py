"""Removal over a whole dataset: every cell against its prompts one at a time, and one compile per bucket."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from removal import RemovalOptions, _random_part, parse_sets, run_removal
from removal_report import removal_figure, removal_text
from support.tiny_model import prompts_file, tiny_checkpoint

from jaxcrit.commands.intervene import InterveneOptions, run_intervene
from jaxcrit.core.errors import UserError

CONFIG = RemovalOptions(
    sets="0;0,2;random:0,2",
    layers="2,4",
    critical="critical:1",
    max_new_tokens=5,
    batch_size=8,
    prompt_index=3,
    mesh="data=1,fsdp=-1",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("removal")
    rows = [json.loads(line) for line in prompts_file(root / "prompts.jsonl").read_text().splitlines()]
    data = root / "rows.jsonl"
    data.write_text("".join(json.dumps({**row, "response": "so it is"}) + "\n" for row in rows))
    return dataclasses.replace(CONFIG, model=str(tiny_checkpoint(root / "model")), data=str(data))


@pytest.fixture(scope="module")
def found(config):
    jax.clear_caches()  # what other tests have compiled would not be counted
    return run_removal(config)[0][0]


def test_every_cell_is_its_prompts_one_at_a_time(config, found, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "cache"))
    cell = next(cell for cell in found.cells if (cell.layer, cell.name) == (4, "0,2"))
    alone = []
    for index in range(cell.n):
        case = InterveneOptions(
            model=config.model,
            data=config.data,
            layers="4",
            components="0,2",
            prompt_index=index,
            max_new_tokens=5,
            mesh=config.mesh,
            out=str(tmp_path / f"{index}"),
        )
        alone.append(run_intervene(case).found)
    assert cell.changed == sum(one["before"]["token_ids"] != one["after"]["token_ids"] for one in alone) > 0
    assert cell.ended == sum(one["after"]["stopped"] for one in alone)
    longer = [len(one["after"]["token_ids"]) - len(one["before"]["token_ids"]) for one in alone]
    assert cell.length_change[0] == pytest.approx(np.mean(longer), abs=1e-6)
    assert cell.kl[0] == pytest.approx(np.mean([one["next_token_kl"] for one in alone]), rel=1e-3)
    assert cell.kl[1] <= cell.kl[0] <= cell.kl[2]
    assert found.example["answers"]["4"]["0,2"] == alone[3]["after"]["text"]
    assert found.example["answers"]["none"]["nothing"] == alone[3]["before"]["text"]


def test_one_compile_per_bucket_whatever_is_removed(found):
    assert found.compiled == (found.buckets, found.buckets)
    assert len(found.cells) == 6


def test_contrasts_are_differences_of_cells(found):
    cells = {(cell.layer, cell.name): cell for cell in found.cells}
    mean, low, high = found.contrasts["0,2"]["set - random"]["kl"]
    expected = np.mean([cells[layer, "0,2"].kl[0] - cells[layer, "random:0,2"].kl[0] for layer in (2, 4)])
    assert mean == pytest.approx(expected, abs=1e-5) and low <= mean <= high
    (critical,) = found.critical.layers
    if critical in (2, 4):
        other = 6 - critical
        mean, *_ = found.contrasts["0"]["critical - others"]["changed"]
        assert mean == pytest.approx((cells[critical, "0"].changed - cells[other, "0"].changed) / 12, abs=1e-5)


def test_random_directions_take_as_much_of_every_prompt():
    part = np.random.default_rng(0).normal(0, 3, (6, 20))
    drawn = _random_part(part, [0, 1])
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), np.linalg.norm(part, axis=1), rtol=1e-5)
    assert np.abs(np.sum(drawn * part, axis=1) / np.sum(part * part, axis=1)).max() < 0.9
    assert (drawn == _random_part(part, [0, 1])).all() and not (drawn == _random_part(part, [0, 2])).any()


def test_text_and_figure(found):
    text = removal_text(found)
    assert "nothing removed: exact match 0.00 [0.00, 0.24]" in text and "random:0,2" in text
    assert max(map(len, [line for line in text.splitlines() if not line.startswith(("warning", found.dataset))])) <= 100
    assert removal_figure(found).png().startswith(b"\x89PNG")
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize("text", ["", ";", "0,x", "random:", "0;1,1"])
def test_sets_that_cannot_be_read(text):
    with pytest.raises(UserError, match="--sets="):
        parse_sets(text)


def test_components_beyond_the_samples(config):
    with pytest.raises(UserError, match="component 11 of 12 samples"):
        run_removal(dataclasses.replace(config, sets="11"))
