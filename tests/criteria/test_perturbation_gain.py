"""Gains of perturbations: exact where a block is silent, else against derivatives; costs; what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.family_models import BLOCKS
from support.tiny_model import tiny_checkpoint

from jaxcrit.commands.main import main
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_json
from jaxcrit.core.layers import read_scores
from jaxcrit.core.options import determining
from jaxcrit.criteria.perturbation_gain import PerturbationOptions, perturbation_gain
from jaxcrit.criteria.registry import scorable
from jaxcrit.data.batches import make_batches
from jaxcrit.data.datasets import load
from jaxcrit.data.templates import render
from jaxcrit.evidence.perturbed import Moved, block_gains, largest_singular_value, moved, perturbed_pass
from jaxcrit.models.decoder import Decoder, embed, forward, logits
from jaxcrit.models.model import open_model
from jaxcrit.models.sites import Edit
from jaxcrit.parallel.accounting import product_flops
from jaxcrit.parallel.mesh import make_mesh

GAINS = {key: one for key, one in scorable().items() if one.needs == "perturbed"}
WIDE, NARROW, LOCAL = "perturbation_gain_wide", "perturbation_gain", "perturbation_gain_local"
LAYERS = 7
ADDED = Edit(lambda site, before, after, data, positions: after.at[:, 1:].add(data), ("block",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("gains")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCRIT_CACHE", str(path / "cache"))
        yield path


@pytest.fixture(scope="module")
def rows(folder):
    """Prompts of two lengths and one width, so that each program compiles once."""
    rng = np.random.default_rng(0)
    words = ["cat", "dog", "sky", "one", "two", "blue", "sat", "mat", "and", "is"]
    lines = [{"prompt": f"{row} " + " ".join(rng.choice(words, 3 + row % 2))} for row in range(6)]
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


@pytest.fixture(scope="module")
def batch(examples):
    """The first rows as the pass gives them, two lengths among them: tokens, lengths, numbers."""
    first = next(iter(make_batches(examples, 3)))
    return jnp.asarray(first.tokens), jnp.asarray(first.lengths), jnp.arange(3, dtype=jnp.uint32)


def changed(decoder, layer, factor):
    """The decoder whose block adds so many times as much to the stream."""
    weights = decoder.weights()
    last = {path: weights[path].at[layer].multiply(factor) for path in ("blocks.o", "blocks.down")}
    return Decoder(decoder.config, {**weights, **last})


def values(session, decoder, examples, batch_size=3):
    own = {PerturbationOptions: PerturbationOptions(steps=2)}
    found = perturbed_pass(session, decoder, examples, batch_size, GAINS, own=own)
    return {key: one.measured(found[key], own) for key, one in GAINS.items()}


@pytest.fixture(scope="module")
def plain(session, examples):
    return values(session, session.decoder(), examples)


def test_a_silent_block_has_a_gain_of_one_and_a_loud_one_a_larger_one(session, examples, plain):
    """Larger for the smallest changes. A change that is found may be less of a state that a loud block makes longer."""
    plant = 3
    silent = values(session, changed(session.decoder(), plant, 0), examples)
    loud = values(session, changed(session.decoder(), plant, 2), examples)
    for key in (NARROW, WIDE):
        assert silent[key].values[plant] == 1 == silent[key].meta["noise_gain"][plant]
        assert (np.delete(silent[key].values, plant) != 1).all()
    np.testing.assert_allclose(silent[LOCAL].values[plant], 1, rtol=1e-6)
    assert silent[LOCAL].values[plant] < plain[LOCAL].values[plant] < loud[LOCAL].values[plant]


def test_changes_are_relative_and_start_at_their_radius(plain):
    """Noise has the whole radius at the embedding; a search may end inside it, and own searches beat noise anywhere."""
    for key, eps in ((NARROW, 0.05), (WIDE, 0.5)):
        np.testing.assert_allclose(plain[key].meta["noise_change"][0], eps, rtol=1e-5)
        assert plain[key].meta["change"][0] <= eps * (1 + 1e-5)
        np.testing.assert_allclose(
            plain[key].values, np.divide(plain[key].meta["change"][1:], plain[key].meta["change"][:-1]), rtol=1e-12
        )


def test_where_nothing_moves_there_is_no_gain():
    """As of a change that is lost in the rounding of bfloat16."""
    change = np.array([[0.0, 0.0, 0.2, 0.1], [0.0, 0.0, 0.4, 0.3]])
    found = perturbation_gain(Moved(change, change, np.array([3, 5])), PerturbationOptions())
    np.testing.assert_array_equal(found.values, [np.nan, np.inf, 0.4 / (0.2 + 0.4)])
    assert found.meta["noise_gain"][:2] == [None, None] and json.dumps(found.meta, allow_nan=False)


def test_deletions_leave_a_prompt_out_with_all_its_tokens(session, examples, plain):
    without = values(session, session.decoder(), examples[1:])
    for key in GAINS:
        np.testing.assert_allclose(plain[key].without_each[0], without[key].values, rtol=1e-4)


def test_a_search_of_its_own_finds_the_largest_singular_value(session, batch):
    """One token perturbed and measured, eps near 0: w_l is eps ||h_0|| sigma_max(J) / ||h_l||, to 5 %."""
    decoder, (tokens, lengths, _), at, eps = session.decoder(), batch, 2, 1e-3
    mask = jnp.zeros(tokens.shape, bool).at[:, at].set(True)

    def states(delta):
        offset = jnp.zeros((*tokens.shape, session.config.width)).at[:, at].set(delta)
        return forward(decoder, tokens, lengths=lengths, offset=offset, tap=BLOCKS).taps["block"][:, :, at]

    with jax.default_matmul_precision("highest"):
        found, noise = moved(decoder, *batch, 0, eps, steps=50, own=True, perturbed=mask)
        start = jnp.zeros((3, session.config.width))
        clean = np.asarray(states(start))
        jacobian = np.asarray(jax.jit(jax.jacfwd(states))(start))  # [L, B, D, B, D]
    first = np.linalg.norm(np.asarray(embed(decoder, tokens))[:, at], axis=-1)
    for row in range(3):
        sigma = np.linalg.svd(jacobian[:, row, :, row], compute_uv=False)[:, 0]
        expected = eps * first[row] * sigma / np.linalg.norm(clean[:, row], axis=-1)
        np.testing.assert_allclose(found[1:, row], expected, rtol=0.05)
    np.testing.assert_allclose(found[0], eps, rtol=1e-3)
    assert (found[1:] > noise[1:]).all()


def test_largest_singular_values_of_linear_maps():
    matrices = np.random.default_rng(0).standard_normal((4, 12, 12)).astype(np.float32)
    start = jnp.asarray(np.random.default_rng(1).standard_normal((4, 12)), jnp.float32)
    found = largest_singular_value(lambda x: jnp.einsum("bij,bj->bi", matrices, x), jnp.zeros((4, 12)), start, 200)
    np.testing.assert_allclose(found, np.linalg.svd(matrices, compute_uv=False)[:, 0], rtol=1e-4)
    few = largest_singular_value(lambda x: jnp.einsum("bij,bj->bi", matrices, x), jnp.zeros((4, 12)), start, 2)
    assert (few < found).all()


def test_a_block_by_itself_against_its_whole_derivative(session, batch):
    decoder, (tokens, lengths, _) = session.decoder(), batch
    layer, row = 4, 0
    prompt = tokens[row : row + 1, : int(lengths[row])]
    shape = (prompt.shape[1] - 1, session.config.width)

    def behind(change):
        """States behind the block, of a change of those in front of it."""
        edits = jnp.zeros((LAYERS, *shape)).at[layer - 1].set(change)
        return forward(decoder, prompt, edit=ADDED, edits=edits, tap=BLOCKS).taps["block"][:, 0, 1:]

    with jax.default_matmul_precision("highest"):
        found = block_gains(decoder, *batch, 0, 300)
        states = behind(jnp.zeros(shape))
        jacobian = jax.jit(jax.jacfwd(lambda change: behind(change)[layer]))(jnp.zeros(shape))
    before, after = (np.linalg.norm(states[one], axis=-1) for one in (layer - 1, layer))
    scaled = np.asarray(jacobian, np.float64) * before[:, None] / after[:, None, None, None]
    expected = np.linalg.svd(scaled.reshape(np.prod(shape), -1), compute_uv=False)[0]
    np.testing.assert_allclose(found[layer, row], expected, rtol=1e-3)


def test_what_a_search_costs(session, batch):
    """In products, against the number of forward passes that the docstring names."""
    decoder, (tokens, lengths, _) = session.decoder(), batch

    def once(tokens):
        return logits(decoder, forward(decoder, tokens, lengths=lengths).hidden[:, -1])

    single = product_flops(once, tokens)
    for steps in (1, 5):
        search = functools.partial(moved, steps=steps, own=False)
        whole = product_flops(lambda *given, search=search: search(decoder, *given, 0, 0.05), *batch)
        np.testing.assert_allclose(whole / single, 3 * steps + 4, rtol=0.05)


def test_command(session, rows, plain, tmp_path, capsys):
    """On all devices, in other batches: the same values."""
    flags = ["score", f"--model={session.checkpoint.path}", f"--data={rows}", f"--out={tmp_path / 'run'}"]
    assert main([*flags, f"--criteria={NARROW},{LOCAL}", "--perturbation_gain.steps=2"]) == 0
    out = capsys.readouterr().out
    assert "perturbation_gain: noise of the same size ranks the layers with ρ " in out
    scores = read_scores(tmp_path / "run" / "scores.json")
    assert list(scores) == [NARROW, LOCAL] and all(one.direction == "high" for one in scores.values())
    for key, one in scores.items():
        np.testing.assert_allclose(one.values, plain[key].values, rtol=2e-3)
    assert len(scores[NARROW].meta["change"]) == LAYERS + 1 and (scores[NARROW].stderr > 0).all()
    record = read_json(tmp_path / "run" / "run.json", "jaxcrit.run")
    assert record["determines"]["config"]["perturbation_gain.steps"] == 2


def test_another_question_is_another_run():
    for name, other in {"eps": 0.1, "wide": 1.0, "steps": 6, "own": True, "rounds": 11, "seed": 1}.items():
        changed = dataclasses.replace(PerturbationOptions(), **{name: other})
        assert determining(changed) != determining(PerturbationOptions())


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("eps=0", "--perturbation_gain.eps=0.0: expected a number above 0"),
        ("wide=-1", "--perturbation_gain.wide=-1.0: expected a number above 0"),
        ("steps=0", "--perturbation_gain.steps=0: expected 1 or more"),
    ],
)
def test_bad_options(rows, flag, message, capsys):
    assert main(["score", f"--data={rows}", f"--criteria={NARROW}", f"--perturbation_gain.{flag}"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_prompt_of_one_token(session, examples):
    short = [dataclasses.replace(one, prompt_length=1) if row == 2 else one for row, one in enumerate(examples, 1)]
    with pytest.raises(UserError, match=r"expected prompts of two tokens or more.*row 2 has one"):
        perturbed_pass(session, session.decoder(), short, 2, {NARROW: GAINS[NARROW]})
