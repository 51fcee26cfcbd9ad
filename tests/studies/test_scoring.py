"""``jaxcrit score``: shared passes against rows one by one, planted models, files, bad input."""

from __future__ import annotations

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.family_models import BLOCKS
from support.tiny_model import tiny_checkpoint

from jaxcrit.commands.main import main
from jaxcrit.commands.score import ScoreOptions, run_score
from jaxcrit.core.deletions import read_deletions
from jaxcrit.core.files import read_json
from jaxcrit.core.layers import read_scores
from jaxcrit.criteria.fisher import fisher
from jaxcrit.criteria.gradient_norm import gradient_norm
from jaxcrit.criteria.registry import parse_criteria, scorable
from jaxcrit.criteria.rgn import rgn
from jaxcrit.criteria.weight_change import weight_change
from jaxcrit.data.datasets import load
from jaxcrit.data.templates import render
from jaxcrit.evidence.backward import response_gradients
from jaxcrit.evidence.forward import all_tokens, compiled_passes, forward_pass, last_token, mean_token, with_embedding
from jaxcrit.evidence.weights import layer_tensors, weight_changes, weight_spectra
from jaxcrit.models.decoder import Decoder, embed, forward, logits
from jaxcrit.models.lora import make_lora
from jaxcrit.models.model import Model, open_model
from jaxcrit.models.overlays import Overlay
from jaxcrit.models.partition import TRAIN, partition
from jaxcrit.parallel.mesh import make_mesh

LAYERS = 7


def rows_file(path, count=5, seed=0):
    rng = np.random.default_rng(seed)
    words = ["cat", "dog", "sky", "one", "two", "blue", "sat", "mat", "and", "is"]
    lengths = [(1, 2), (4, 2), (2, 3), (4, 2), (1, 2)]
    rows = [
        {"prompt": f"{i} " + " ".join(rng.choice(words, long)), "response": " ".join(rng.choice(words, answer))}
        for i, (long, answer) in enumerate(lengths[:count])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("scoring")


@pytest.fixture(scope="module", autouse=True)
def cache(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCRIT_CACHE", str(folder / "cache"))
        yield


@pytest.fixture(scope="module")
def session(folder):
    path = tiny_checkpoint(folder / "model")
    return open_model(str(path), mesh=make_mesh(None, jax.devices()[:1]))


@pytest.fixture(scope="module")
def decoder(session):
    return session.decoder()


@pytest.fixture(scope="module")
def examples(folder, session):
    (named,) = load(str(rows_file(folder / "rows.jsonl")))
    return render(named.rows, session.tokenizer, "auto", named.source)


TAPPED = {key: one for key, one in scorable().items() if one.needs == "forward"}
# Last states with the embedding in front, and the two other common taps, as criteria whose score is what they tap.
PROBES = {
    key: dataclasses.replace(TAPPED["effective_rank"], tap=tap, score=lambda found: found)
    for key, tap in (
        ("last", with_embedding(last_token)),
        ("mean", mean_token),
        ("tokens", with_embedding(all_tokens(1000))),
        ("few", all_tokens(4)),
    )
}


def states_of(session, decoder, examples):
    """By key what each tap gives, and by ``probe`` the bare ones."""
    return forward_pass(session, decoder, examples, 2, {**TAPPED, **PROBES})


def value(found, key):
    return TAPPED[key].measured(found[key], {}).values


@pytest.fixture(scope="module")
def found(session, decoder, examples):
    """Both passes, rows of mixed length in batches of 2 with one left over."""
    return (
        states_of(session, decoder, examples),
        response_gradients(session, decoder, examples, 2, per_sample=True),
    )


def changed(decoder, **changes):
    """The decoder with functions of its block weights ``[L, ...]`` applied."""
    weights = decoder.weights()
    return Decoder(
        decoder.config, {**weights, **{f"blocks.{n}": f(weights[f"blocks.{n}"]) for n, f in changes.items()}}
    )


def test_states_are_those_of_single_prompts(decoder, examples, found):
    states, _ = found
    cos, kl, entropy, tokens, each = [], [], [], [], []
    for row, example in enumerate(examples):
        prompt = jnp.asarray(example.token_ids[: example.prompt_length])[None]
        with jax.default_matmul_precision("highest"):
            taps = forward(decoder, prompt, tap=BLOCKS).taps["block"][:, 0]
            read = np.asarray(logits(decoder, taps[:, -1]), np.float64)
        hidden = np.concatenate([np.asarray(embed(decoder, prompt)), taps]).astype(np.float64)
        np.testing.assert_allclose(states["last"][row], hidden[:, -1], atol=1e-4)
        np.testing.assert_allclose(states["mean"][row], hidden[1:].mean(1), atol=1e-4)
        each.append(hidden[:, 1:])
        unit = hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)
        cos.append((unit[1:] * unit[:-1]).sum(-1))
        shifted = read - read.max(-1, keepdims=True)
        log = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        kl.append((np.exp(log[-1]) * (log[-1] - log)).sum(-1))
        entropy.append(-(np.exp(log) * log).sum(-1))
        tokens.append(len(prompt[0]))
    assert len(set(tokens)) > 1
    each = np.concatenate(each, axis=1).swapaxes(0, 1)  # every token but the first of each prompt, prompt by prompt
    np.testing.assert_allclose(states["tokens"], each, atol=1e-4)
    np.testing.assert_allclose(states["few"], each[:4, 1:], atol=1e-4)
    expected = 1 - np.concatenate(cos, axis=1).mean(axis=1)
    np.testing.assert_allclose(value(states, "block_influence"), expected, atol=1e-5)
    last = np.stack([one[:, -1] for one in cos])
    np.testing.assert_allclose(value(states, "angular_distance"), (np.arccos(last) / np.pi).mean(0), atol=1e-5)
    np.testing.assert_allclose(value(states, "lens_kl"), np.mean(kl, axis=0), rtol=1e-5, atol=1e-5)
    assert value(states, "lens_kl")[-1] == 0
    np.testing.assert_allclose(value(states, "lens_entropy"), np.mean(entropy, axis=0), rtol=1e-5)


def test_a_tap_that_criteria_share_is_computed_once(session, decoder, examples):
    """Also where one of them has a ``finish``; and all criteria together compile no more often than one."""

    def calls(*finishes):
        traced, before = [], compiled_passes()

        def tap(before, after, view):
            traced.append(after.shape)
            return view.last(after)

        rows = {str(n): dataclasses.replace(TAPPED["lens_kl"], tap=tap, finish=one) for n, one in enumerate(finishes)}
        assert forward_pass(session, decoder, examples, 2, rows).keys() == rows.keys()
        return traced, compiled_passes() - before

    alone, together = calls(None), calls(None, TAPPED["lens_kl"].finish, None)
    assert together == alone and alone[0]


def test_gradients_are_those_of_single_rows(session, decoder, examples, found):
    _, given = found
    weights = decoder.weights()
    blocks = {path: value for path, value in weights.items() if path.startswith("blocks.")}

    def loss(blocks, tokens, prompt_length):
        """Summed -log p of the response, written out."""
        model = Decoder(decoder.config, {**weights, **blocks})
        scores = logits(model, forward(model, tokens[None]).hidden)[0]
        log = jax.nn.log_softmax(scores, axis=-1)[prompt_length - 1 : -1]
        return -jnp.take_along_axis(log, tokens[prompt_length:, None], axis=1).sum()

    with jax.default_matmul_precision("highest"):
        gradient = jax.jit(jax.grad(loss), static_argnums=2)
        each = [gradient(blocks, jnp.asarray(e.token_ids), e.prompt_length) for e in examples]
    each = [{path: np.asarray(value, np.float64) for path, value in one.items()} for one in each]
    tokens = sum(len(e.token_ids) - e.prompt_length for e in examples)

    def squares(arrays):
        return sum((value**2).reshape(LAYERS, -1).sum(1) for value in arrays.values())

    total = {path: sum(one[path] for one in each) / tokens for path in blocks}
    sizes = sum(value[0].size for value in blocks.values())
    norms = squares({path: np.asarray(value, np.float64) for path, value in blocks.items()})
    np.testing.assert_allclose(gradient_norm(given).values, np.sqrt(squares(total)), rtol=1e-5)
    np.testing.assert_allclose(rgn(given).values, np.sqrt(squares(total) / norms), rtol=1e-5)
    expected = np.mean([squares(one) for one in each], axis=0) / sizes
    np.testing.assert_allclose(fisher(given).values, expected, rtol=1e-5)
    together = response_gradients(session, decoder, examples, 2, per_sample=False)
    np.testing.assert_allclose(together.total, given.total, rtol=1e-5)
    assert together.samples is None


def test_a_block_that_does_nothing(session, decoder, examples):
    """Its output shut off: no turn, and no reading changes. With its norms too no gradient, though it could learn."""
    plant = 3

    def off(layers):
        return lambda value: value.at[jnp.asarray(layers)].set(0)

    states = states_of(session, changed(decoder, o=off([plant]), down=off([plant])), examples)
    for key in ("angular_distance", "block_influence"):
        values = value(states, key)
        assert values[plant] < 1e-7 and np.delete(values, plant).min() > 1e-3
    later = list(range(plant + 1, LAYERS))
    states = states_of(session, changed(decoder, o=off(later), down=off(later)), examples)
    values = value(states, "lens_kl")
    assert values[plant:].max() < 1e-6 < 1e-2 < values[:plant].min()  # the answer settles at the plant
    others = [layer for layer in range(LAYERS) if layer != plant]
    dead = changed(decoder, **{name: off(others) for name in ("o", "down", "attn_norm", "mlp_norm")})
    given = response_gradients(session, dead, examples, 2, per_sample=True)
    for values in (gradient_norm(given).values, fisher(given).values):
        assert values[plant] > 0 and (np.delete(values, plant) == 0).all()


def test_lens_is_blind_to_the_length_of_the_stream(session, decoder, examples, found):
    """The stream ten times as long from the embedding on, blocks likewise: readings stay, and so do turns."""
    weights = decoder.weights()
    grown = {path: value * 10 if path in ("blocks.o", "blocks.down") else value for path, value in weights.items()}
    grown |= {"embed": weights["embed"] * 10, "head": weights["embed"]}
    longer = Decoder(dataclasses.replace(decoder.config, tied=False), grown)
    states = states_of(session, longer, examples)
    np.testing.assert_allclose(value(states, "lens_kl"), value(found[0], "lens_kl"), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(value(states, "lens_entropy"), value(found[0], "lens_entropy"), rtol=1e-3)
    np.testing.assert_allclose(value(states, "block_influence"), value(found[0], "block_influence"), rtol=1e-3)


def test_gradients_follow_the_scale_of_weights(session, decoder, examples, found):
    """up x 4 and down / 4 in one layer leave the model as it is; gradient norm and Fisher move all the same."""
    plant, factor = 2, jnp.ones(LAYERS).at[2].set(4.0)[:, None, None]
    same = changed(decoder, up=lambda value: value * factor, down=lambda value: value / factor)
    given = response_gradients(session, same, examples, 2, per_sample=True)
    ratio = given.total / found[1].total
    np.testing.assert_allclose(np.delete(ratio, plant), 1, rtol=1e-3)
    assert ratio[plant] > 1.05


@pytest.fixture(scope="module")
def descent(decoder, examples):
    """One step of gradient descent, some layers of which are taken as tuning only these."""
    weights = decoder.weights()
    blocks = {path: value for path, value in weights.items() if path.startswith("blocks.")}
    tokens = jnp.asarray(examples[0].token_ids)

    def loss(blocks):
        model = Decoder(decoder.config, {**weights, **blocks})
        return -jax.nn.log_softmax(logits(model, forward(model, tokens[None]).hidden))[0, -2, tokens[-1]]

    return jax.jit(jax.grad(loss))(blocks)


def tuned(session, decoder, descent, layers):
    """A session as of a fine-tuning run of these layers."""
    parts, weights, at = partition(session.config, layers), decoder.weights(), np.asarray(layers)
    trained = {path: (weights[path] - 0.1 * value)[at] for path, value in descent.items()}
    return dataclasses.replace(session, overlays=(Overlay(parts, {TRAIN: trained}, session.checkpoint.path, 1),))


@pytest.mark.parametrize("plant", range(LAYERS))
def test_weight_change_names_the_layer(session, decoder, descent, plant):
    values = weight_change(weight_changes(session, tuned(session, decoder, descent, [plant]))).values
    assert values[plant] > 0 and (np.delete(values, plant) == 0).all()


def test_weight_change_names_two_layers(session, decoder, descent):
    values = weight_change(weight_changes(session, tuned(session, decoder, descent, [1, 5]))).values
    assert set(np.argsort(values)[-2:]) == {1, 5}


@pytest.mark.parametrize("adapters", [False, True])
def test_tensors_of_a_run_are_those_of_its_model(session, decoder, descent, adapters):
    run = tuned(session, decoder, descent, [2, 4])
    if adapters:
        lora, rng = make_lora(session.config, 2), np.random.default_rng(0)
        shapes = lora.shapes(session.config, 2)
        entries = {path: jnp.asarray(rng.normal(0, 0.1, shape), jnp.float32) for path, (_, shape) in shapes.items()}
        parts = partition(session.config, [2, 4], lora=lora)
        second = dataclasses.replace(run.overlays[0], partition=parts, params={TRAIN: entries})
        run = dataclasses.replace(run, overlays=(*run.overlays, second))
    weights = run.decoder().weights()
    for layer, tensors in enumerate(layer_tensors(run)):
        for path, value in tensors.items():
            np.testing.assert_allclose(value.ravel(), np.asarray(weights[path][layer]).ravel(), atol=1e-6)


def test_weight_change_is_blind_to_what_weights_do(folder, session):
    """Hidden units in another order: the same function, counted as a change in full."""
    other = folder / "permuted"
    tiny_checkpoint(other)
    tensors = load_file(other / "model.safetensors")
    order = np.random.default_rng(0).permutation(32)
    for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        key = f"model.layers.4.mlp.{name}.weight"
        tensors[key] = np.ascontiguousarray(np.take(tensors[key], order, axis=axis))
    from safetensors.numpy import save_file

    save_file(tensors, other / "model.safetensors")
    values = weight_change(weight_changes(session, open_model(str(other), mesh=session.mesh))).values
    assert values.argmax() == 4 and values[4] > 0.8 and (np.delete(values, 4) == 0).all()


@pytest.fixture
def config(folder, session, examples, tmp_path):
    return ScoreOptions(model=str(session.checkpoint.path), data=str(folder / "rows.jsonl"), out=str(tmp_path / "run"))


def test_files_and_one_pass_each(config, tmp_path, monkeypatch, capsys):
    passes = []
    for call in (forward_pass, response_gradients, weight_spectra):
        room, name, original = sys.modules[call.__module__], call.__name__, call
        monkeypatch.setattr(
            room, name, lambda *a, name=name, original=original, **k: passes.append(name) or original(*a, **k)
        )
    scored = run_score(config)
    assert sorted(passes) == ["forward_pass", "response_gradients", "weight_spectra"]
    out = tmp_path / "run"
    kept = read_scores(out / "scores.json")
    few = {"cluster_nmi", "cluster_step", "cohesion_rise"}  # left out, for want of tokens and prompts
    of_any = parse_criteria("", two_models=False)
    assert list(kept) == [key for key, one in of_any.items() if one.needs != "routing" and key not in few]
    np.testing.assert_array_equal(kept["fisher"].values, scored.scores["fisher"].values)
    left = read_deletions(out, "angular_distance")
    assert left.values.shape == (5, LAYERS) and read_deletions(out, "rgn") is None
    assert kept["angular_distance"].stderr is not None and kept["stable_rank"].stderr is None
    assert read_json(out / "run.json", "jaxcrit.run")["status"] == "complete"
    before = (out / "scores.json").read_bytes()
    run_score(config)
    assert (out / "scores.json").read_bytes() == before
    assert main(["select", f"--scores={out}/scores.json", "--criterion=fisher", "--layers=critical:2"]) == 0
    assert main(["correlate", f"--scores={out}:fisher", f"--scores={out}:angular_distance"]) == 0
    assert "not available" not in capsys.readouterr().out


def test_command(config, tmp_path, capsys):
    flags = [f"--model={config.model}", f"--data={config.data}", f"--out={tmp_path / 'run'}"]
    assert main(["score", *flags, "--criteria=rgn,stable_rank,block_influence"]) == 0
    out = capsys.readouterr().out
    choices, table = out.split("\n\n")[:2]
    assert [line.split()[0] for line in choices.splitlines()[1:]] == ["rgn", "stable_rank", "block_influence"]
    assert table.split()[:4] == ["layer", "rgn", "stable_rank", "block_influence"]
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 100
    assert "blind to others" in (tmp_path / "run" / "report.html").read_text()
    assert (tmp_path / "run" / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_several_datasets_are_joined_by_rank(config, folder, tmp_path):
    rows_file(folder / "more.jsonl", 4, seed=1)
    both = f"{config.data},{folder / 'more.jsonl'}"
    scored = run_score(dataclasses.replace(config, data=both, criteria="angular_distance,stable_rank"))
    assert list(scored.datasets) == ["rows", "more"]
    assert scored.scores["angular_distance"].meta["consensus"] == "mean_rank"
    assert scored.scores["stable_rank"].values.mean() == pytest.approx(1)  # of the model alone, not ranked
    assert set(read_scores(tmp_path / "run" / "more" / "scores.json")) == {"angular_distance"}


def test_weights_alone_build_no_model(config, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a model was built, or data read")

    monkeypatch.setattr(Model, "decoder", never)
    monkeypatch.setattr(Model, "read", never)
    run_score(dataclasses.replace(config, base=config.model, criteria="stable_rank,weight_snr,weight_change"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criteria": "fishr"}, "did you mean 'fisher'"),
        ({"criteria": "weight_change"}, "give --base=DIR too"),
        ({"criteria": "weight_change", "base": "{0}/wide"}, "they differ in embed, head_dim (16 and 24, 4 and 6)"),
        ({"criteria": "weight_change", "base": "/nowhere"}, "--base=/nowhere: no such directory"),
        ({"criteria": "rgn", "data": "{0}/silent.jsonl"}, "row 2, 3, 4 has no response to learn from"),
        ({"batch_size": "0"}, "--batch_size=0"),
    ],
)  # fmt: skip
def test_refuses(config, folder, tmp_path, capsys, changes, message):
    if "base" in changes:
        tiny_checkpoint(folder / "wide", hidden_size=16)
    (folder / "silent.jsonl").write_text(
        '{"prompt": "a", "response": "b"}\n{"prompt": "c"}\n{"prompt": "d"}\n{"prompt": "e"}\n'
    )
    asked = {"model": config.model, "data": config.data, "out": tmp_path / "run", **changes}
    assert main(["score", *(f"--{name}={str(value).format(folder)}" for name, value in asked.items())]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
