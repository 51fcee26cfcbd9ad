"""The whole of ``jaxcrit intervene`` on a tiny random model: what it computes, against the parts; bad input."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from support.family_models import load_path
from support.tiny_model import prompts_file, tiny_checkpoint

from jaxcrit.commands.intervene import InterveneOptions, one_dataset, run_intervene, states
from jaxcrit.commands.intervene import text as intervention_text
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_json
from jaxcrit.evaluation.losses import divergence
from jaxcrit.models.generation import generate
from jaxcrit.models.interventions import edit, intervention
from jaxcrit.models.model import open_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "cache"))
    data = prompts_file(tmp_path / "prompts.jsonl")
    return InterveneOptions(
        model=str(model),
        data=str(data),
        out=str(tmp_path / "run"),
        max_new_tokens=5,
        layers="3",
        prompt_index=4,
        components="0,2",
        mesh="data=1,fsdp=-1",
    )


def expected_answer(config, shifts):
    """The answer with these vectors added by layer, put together from the parts."""
    session = open_model(config.model)
    prompt = one_dataset(config, session).examples[config.prompt_index].token_ids
    edits = intervention((7, 1, 24), shifts=shifts)
    found = generate(
        load_path(session.checkpoint.path), prompt[None], np.array([len(prompt)]), 5, stop=[1], edit=edit, edits=edits
    )
    return found.token_ids[0]


def hidden_of(config):
    session = open_model(config.model)
    return states(session.decoder(), one_dataset(config, session), session, None)


def test_the_prompts_own_part_is_subtracted(config, tmp_path):
    done = run_intervene(config)
    found = read_json(tmp_path / "run" / "intervention.json", "jaxcrit.intervention")
    assert {key: found[key] for key in done.found} == done.found
    states3 = hidden_of(config)[3].astype(np.float64)
    u, s, v = np.linalg.svd(states3 - states3.mean(axis=0), full_matrices=False)
    part = (u[4, [0, 2]] * s[[0, 2]]) @ v[[0, 2]]
    assert found["after"]["token_ids"] == expected_answer(config, {3: -part})
    assert found["before"]["token_ids"] == expected_answer(config, {})
    np.testing.assert_allclose(found["of"]["3"], (s**2 / (s**2).sum())[[0, 2]], atol=1e-5)
    assert found["next_token_kl"] > 0 and len(found["lens"]["3"]) == 2
    text = intervention_text(done)
    assert "the prompt's part of components 0, 2 subtracted" in text and "layer 3 component 2" in text


def test_no_components_and_mode_none_change_nothing(config, tmp_path):
    for name, changes in (("a", {"components": ""}), ("b", {"mode": "none"})):
        done = run_intervene(dataclasses.replace(config, layers="", out=str(tmp_path / name), **changes))
        found = done.found
        assert found["layers"] == [3], "the middle one of seven, where none is named"
        assert ("nothing changed: give another --layers" in intervention_text(done)) == (name == "a")
        assert found["before"] == found["after"] and found["next_token_kl"] == 0


def test_the_first_new_token_alone_or_all_others(config, tmp_path):
    found = {}
    for at in ("all", "first", "later"):
        done = run_intervene(dataclasses.replace(config, out=str(tmp_path / at), at=at, components="0,1,2"))
        found[at] = done.found
        assert ("first new token" in intervention_text(done)) == (at != "all")
    assert found["first"]["next_token_kl"] == found["all"]["next_token_kl"] > 0 == found["later"]["next_token_kl"]
    answers = {at: one["after"]["token_ids"] for at, one in found.items()}
    assert answers["first"][0] == answers["all"][0] and answers["later"][0] == found["all"]["before"]["token_ids"][0]


def test_steering_adds_the_difference_of_means(config, tmp_path):
    sets = [prompts_file(tmp_path / f"{name}.jsonl", count=5, seed=seed) for seed, name in enumerate("ab", 5)]
    steer = dataclasses.replace(config, mode="steer", steer_from=str(sets[0]), steer_to=str(sets[1]), strength=-3.0)
    found = run_intervene(steer).found
    means = [hidden_of(dataclasses.replace(config, data=str(path))).mean(axis=1)[3] for path in sets]
    assert found["after"]["token_ids"] == expected_answer(config, {3: -3.0 * (means[1] - means[0])})


def test_critical_layers_are_found_where_they_are_asked_for(config):
    done = run_intervene(dataclasses.replace(config, layers="critical:2", mode="project"))
    assert len(done.found["layers"]) == 2 and set(done.found["layers"]) <= {2, 3, 4}
    named = run_intervene(
        dataclasses.replace(config, layers="delta_debiased:2", mode="project", out=f"{config.out}-named")
    )
    assert named.found["layers"] == done.found["layers"]


def test_divergence_is_that_of_the_softmaxes():
    p, q = np.random.default_rng(0).normal(0, 2, (2, 3, 7))
    shares = [np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (p, q)]
    expected = (shares[0] * np.log(shares[0] / shares[1])).sum(axis=1)
    np.testing.assert_allclose(divergence(p, q), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_index": 12}, "--prompt_index=12: expected 0 to 11"),
        ({"layers": "7"}, "expected layers 0 to 6, got 7"),
        ({"layers": "boundary(stpe:2)"}, "no score 'stpe' (did you mean 'step'?)"),
        ({"components": "0,x"}, "--components=0,x: expected different whole numbers"),
        ({"components": "0,0"}, "--components=0,0: expected different whole numbers"),
        ({"components": "11"}, "expected at most component 10 (counted from 0)"),
        ({"components": "1000"}, "expected at most component 10 (counted from 0)"),
        ({"mode": "projekt"}, "did you mean 'project'"),
        ({"mode": "steer"}, "expected --steer_from=FILE and --steer_to=FILE"),
        ({"steer_from": "x"}, "go with --mode=steer"),
        ({"stop": "nothing of the kind"}, "expected one token of this tokenizer"),
        ({"max_new_tokens": 60}, "60 new tokens take part of the context"),
        ({"data": "demo:arithmetic,demo:choice", "limit": 2, "truncate": "left"}, "components are of one dataset"),
    ],
    ids=str,
)
def test_bad_input_leaves_nothing_behind(config, tmp_path, changes, message):
    with pytest.raises(UserError) as caught:
        run_intervene(dataclasses.replace(config, **changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_unidentified_components_are_named_with_their_gap(config):
    done = run_intervene(dataclasses.replace(config, components="2,4,6,8"))
    assert any("are not told apart by 12 samples (relative gap" in text for text in done.warnings)
