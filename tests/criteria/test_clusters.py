"""cluster_nmi and cluster_step: planted labels and states, a silenced block, what is refused, what tells runs apart."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny_model import tiny_checkpoint

from jaxcrit.commands.main import main
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_json
from jaxcrit.core.layers import read_scores
from jaxcrit.core.options import determining
from jaxcrit.criteria import cluster_nmi
from jaxcrit.criteria.cluster_nmi import ClusterOptions, clusterings, lloyd, nmi, regrouping, start
from jaxcrit.criteria.registry import parse_criteria, scorable
from jaxcrit.data.datasets import load
from jaxcrit.data.templates import render
from jaxcrit.evidence.forward import compiled_passes, forward_pass
from jaxcrit.models.decoder import Decoder
from jaxcrit.models.model import open_model
from jaxcrit.parallel.mesh import make_mesh

CLUSTERS = {key: one for key, one in scorable().items() if one.options is ClusterOptions}
SMALL = ClusterOptions(clusters=3, seeds=2, tokens=60)


def test_equal_and_renamed_labels_share_everything():
    labels = np.random.default_rng(0).integers(0, 7, 500)
    renamed = np.random.default_rng(1).permutation(7)[labels]
    assert nmi(labels, labels) == 1 and nmi(labels, renamed) == 1


def test_constant_labels_share_nothing_unless_both_are():
    labels, constant = np.arange(50) % 4, np.zeros(50, int)
    assert nmi(labels, constant) == 0 and nmi(constant, labels) == 0
    assert nmi(constant, constant + 3) == 1


def blobs(truth, seed=0, width=6):
    """States about one far centre per group."""
    rng = np.random.default_rng(seed)
    return (20 * np.eye(width)[truth] + rng.standard_normal((len(truth), width))).astype(np.float32)


def test_blobs_well_apart_are_found():
    truth = np.random.default_rng(0).permutation(np.arange(200) % 4)
    labels = clusterings(np.stack([blobs(truth), blobs(truth, seed=1)]), 4, 3)
    assert labels.shape == (3, 2, 200)
    assert [[nmi(one, truth) for one in by_seed] for by_seed in labels] == [[1, 1]] * 3


def test_a_planted_regrouping():
    """Layers 0 and 1 group as the embedding does, layer 2 at random anew, layer 3 as layer 2."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 4, 400), rng.integers(0, 4, 400)
    states = np.stack([blobs(group, seed) for seed, group in enumerate((first, first, first, second, second))], axis=1)
    found = regrouping(states, ClusterOptions(clusters=4, seeds=3, tokens=400))
    kept, step = found["cluster_nmi"], found["cluster_step"]
    assert kept.values[:2].tolist() == [1, 1] and (kept.values[2:] < 0.05).all()
    assert step.values[[0, 1, 3]].tolist() == [0, 0, 0] and step.values[2] > 0.95
    # What is unrelated is at chance, and chance is not 0.
    np.testing.assert_allclose(kept.meta["chance"], kept.values[2], atol=0.03)
    assert min(kept.meta["chance"]) > 0 and max(step.meta["chance"]) < 1
    assert kept.stderr.tolist() == [0, 0, 0, 0] == kept.meta["spread"]


def test_more_clusters_share_more_by_chance_and_starts_differ():
    states = np.random.default_rng(0).standard_normal((600, 3, 8)).astype(np.float32)
    few, many = (
        regrouping(states, ClusterOptions(clusters=k, seeds=3, tokens=600))["cluster_nmi"].meta for k in (3, 40)
    )
    assert np.mean(many["chance"]) > 10 * np.mean(few["chance"])
    assert min(many["spread"]) > 0
    one = regrouping(states, ClusterOptions(clusters=3, seeds=1, tokens=600))["cluster_step"]
    assert one.stderr is None and one.meta["spread"] is None


def test_length_does_not_count_unless_asked():
    rng = np.random.default_rng(0)
    truth, length = rng.integers(0, 3, 300), np.array([1, 1e3])[rng.integers(0, 2, 300)].astype(np.float32)
    states = np.stack([blobs(truth), blobs(truth) * length[:, None]], axis=1)
    options = ClusterOptions(clusters=3, seeds=1, tokens=300)
    assert regrouping(states, options)["cluster_nmi"].values.tolist() == [1]
    assert regrouping(states, dataclasses.replace(options, scale=False))["cluster_nmi"].values[0] < 0.9


def test_a_start_is_of_distinct_rows_and_no_cluster_stays_empty():
    """Many equal rows, as equal tokens make them at the embedding."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((12, 4)).astype(np.float32)[rng.permutation(np.arange(200) % 12)]
    for seed in range(5):
        centres = np.asarray(start(jnp.asarray(rows), 12, jax.random.key(seed)))
        assert len(np.unique(centres, axis=0)) == 12
    labels = np.asarray(lloyd(rows, np.repeat(rows[:1], 12, axis=0)))  # the worst start: all centres are one
    assert len(np.unique(labels)) == 12


def test_one_program_clusters_all_layers_and_starts():
    rows = np.random.default_rng(0).standard_normal((5, 90, 7)).astype(np.float32)
    before = cluster_nmi._compiled()._cache_size()
    clusterings(rows, 9, 4)
    clusterings(rows[::-1].copy(), 9, 4)
    assert cluster_nmi._compiled()._cache_size() == before + 1


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (np.eye(29), "clusters=3: expected 10 tokens to a cluster, 30 in all, got 29 without each prompt's first"),
        (np.eye(29)[np.arange(30) % 2], "clusters=3: expected as many distinct states, got 2 at the embedding"),
    ],
)
def test_refuses_states(states, message):
    other = np.random.default_rng(0).standard_normal(states.shape)
    with pytest.raises(UserError, match=message):
        regrouping(np.stack([states, other], axis=1).astype(np.float32), SMALL)
    if "distinct" in message:
        with pytest.raises(UserError, match="got 2 behind layer 0"):
            regrouping(np.stack([other, states], axis=1).astype(np.float32), SMALL)


def test_refuses_a_cap_that_cannot_be_enough():
    with pytest.raises(UserError, match=r"tokens=100: expected 10 tokens to a cluster, 500 for --cluster"):
        ClusterOptions(tokens=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clusters")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCRIT_CACHE", str(path / "cache"))
        yield path


@pytest.fixture(scope="module")
def rows(folder):
    rng = np.random.default_rng(0)
    words = ["cat", "dog", "sky", "one", "two", "blue", "sat", "mat", "and", "is"]
    lines = [{"prompt": f"{i} " + " ".join(rng.choice(words, 3 + i % 6)), "response": "cat"} for i in range(16)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def session(folder):
    return open_model(str(tiny_checkpoint(folder / "model")), mesh=make_mesh(None, jax.devices()[:1]))


@pytest.fixture(scope="module")
def examples(rows, session):
    (named,) = load(str(rows))
    return render(named.rows, session.tokenizer, "auto", named.source)


def test_a_silenced_block_regroups_nothing(session, examples):
    plant, decoder = 3, session.decoder()
    weights = decoder.weights()
    off = {path: weights[path].at[plant].set(0) for path in ("blocks.o", "blocks.down")}
    own = {ClusterOptions: SMALL}
    before = compiled_passes()
    found = forward_pass(session, Decoder(decoder.config, {**weights, **off}), examples, 4, CLUSTERS, own=own)
    widths = {-(-example.prompt_length // 8) for example in examples}
    assert compiled_passes() - before <= len(widths)  # one forward serves both
    assert found["cluster_nmi"] is found["cluster_step"]
    assert found["cluster_nmi"].shape == (60, 8, decoder.config.width)
    step = CLUSTERS["cluster_step"].measured(found["cluster_step"], own)["cluster_step"]
    assert step.values[plant] == 0 == step.meta["spread"][plant]
    assert (np.delete(step.values, plant) > 0).any()


def test_the_same_tokens_whatever_the_batches(session, examples):
    found = [
        forward_pass(session, session.decoder(), examples, size, CLUSTERS, own={ClusterOptions: SMALL})["cluster_nmi"]
        for size in (1, 5)
    ]
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


def test_the_same_tokens_on_several_devices(session, examples):
    several = open_model(str(session.checkpoint.path), mesh=make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4]))
    found = [
        forward_pass(one, one.decoder(), examples, 4, CLUSTERS, own={ClusterOptions: SMALL})["cluster_nmi"]
        for one in (session, several)
    ]
    assert found[1].shape == (60, 8, session.config.width)
    np.testing.assert_allclose(found[1], found[0], atol=1e-4)


def test_command(session, rows, tmp_path, capsys):
    flags = ["score", f"--model={session.checkpoint.path}", f"--data={rows}", f"--out={tmp_path / 'run'}"]
    own = ["--cluster_nmi.clusters=3", "--cluster_nmi.seeds=2"]
    assert main([*flags, "--criteria=cluster_step,cluster_nmi", *own]) == 0
    out = capsys.readouterr().out
    assert "cluster_nmi: by chance" in out and "(labels permuted); the starts spread by up to" in out
    scores = read_scores(tmp_path / "run" / "scores.json")
    assert list(scores) == ["cluster_step", "cluster_nmi"]
    assert [score.direction for score in scores.values()] == ["high", "low"]
    assert scores["cluster_nmi"].meta["clusters"] == 3 and len(scores["cluster_nmi"].meta["chance"]) == 7
    record = read_json(tmp_path / "run" / "run.json", "jaxcrit.run")
    for part in (record["config"], record["determines"]["config"]):
        assert part["cluster_nmi.clusters"] == 3 and part["cluster_nmi.tokens"] == 4096
    # Another number of clusters is another run.
    assert main([*flags, "--criteria=cluster_step,cluster_nmi", "--cluster_nmi.clusters=2"]) == 2
    assert str(tmp_path / "run") in capsys.readouterr().err


def test_every_option_of_the_clusters_determines_a_run():
    for field, value in (("clusters", 9), ("seeds", 9), ("tokens", 999), ("scale", False)):
        changed = dataclasses.replace(ClusterOptions(), **{field: value})
        assert determining(changed) != determining(ClusterOptions())


def test_too_few_tokens_are_refused_by_name_and_left_out_otherwise(session, rows, tmp_path, capsys):
    flags = ["score", f"--model={session.checkpoint.path}", f"--data={rows}", f"--out={tmp_path / 'run'}"]
    assert main([*flags, "--criteria=cluster_nmi"]) == 2
    err = capsys.readouterr().err
    assert "--cluster_nmi.clusters=50: expected 10 tokens to a cluster" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert main(flags) == 0
    scores = read_scores(tmp_path / "run" / "scores.json")
    of_any = parse_criteria("", two_models=False)
    assert list(scores) == [key for key, one in of_any.items() if one.needs != "routing" and key not in CLUSTERS]
    warnings = read_json(tmp_path / "run" / "run.json", "jaxcrit.run")["warnings"]
    left_out = [text for text in warnings if "is left out:" in text]
    assert [text.partition(": ")[0] for text in left_out] == list(CLUSTERS)
    assert all("is left out: --cluster_nmi.clusters=50: expected 10 tokens" in text for text in left_out)


def test_an_option_of_a_criterion_that_is_not_asked_for(session, rows, tmp_path, capsys):
    flags = ["score", f"--model={session.checkpoint.path}", f"--data={rows}", f"--out={tmp_path / 'run'}"]
    assert main([*flags, "--criteria=rgn", "--cluster_nmi.clusters=7"]) == 2
    assert (
        "--cluster_nmi.clusters=7: is an option of cluster_nmi and cluster_step; name one of them in --criteria"
        in capsys.readouterr().err
    )
    file = tmp_path / "options.toml"
    file.write_text("[cluster_nmi]\nclusters = 1\n")
    assert main([*flags, f"--config={file}"]) == 2
    assert "options.toml, line 2: --cluster_nmi.clusters=1: expected 2 or more" in capsys.readouterr().err


def test_in_python(session, rows):
    import jaxcrit

    found = jaxcrit.score(session, rows, criteria="cluster_nmi", cluster_nmi={"clusters": 3, "seeds": 1})
    assert found["cluster_nmi"].meta["seeds"] == 1
    with pytest.raises(UserError, match=r"unknown option 'cluster_nmi.cluster' \(did you mean 'cluster_nmi.clusters'"):
        jaxcrit.score(session, rows, criteria="cluster_nmi", cluster_nmi={"cluster": 3})
