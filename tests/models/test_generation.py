"""Generation through the cache against running the whole sequence again for every token, and what it draws."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHARED
from scipy import stats
from support.family_models import LENGTH, load_path, raw_config, sequences, states, write_model

from jaxcrit.core.errors import UserError
from jaxcrit.models import generation
from jaxcrit.models.generation import compiled_programs, generate
from jaxcrit.models.sampling import Sampling, pick, restrict
from jaxcrit.models.sites import Edit
from jaxcrit.parallel.mesh import make_mesh, parse_mesh

NEW = 6


@pytest.fixture(params=["stack", "apart"])
def layout(request, monkeypatch):
    """Blocks in their stack, and blocks apart, as a CPU generates many tokens."""
    monkeypatch.setattr(generation, "APART", {"stack": 10**9, "apart": 1}[request.param])


def greedy(decoder, tokens, lengths, max_new_tokens, **options):
    return generate(decoder, tokens, lengths, max_new_tokens, **options).token_ids


def recomputed(decoder, prompt):
    """The slow reference: one forward pass over everything for every token."""
    tokens = np.zeros((1, LENGTH), np.int32)
    tokens[0, : len(prompt)] = prompt
    for length in range(len(prompt), len(prompt) + NEW):
        _, logits = states(decoder, tokens, np.array([length], np.int32))
        tokens[0, length] = int(np.argmax(logits[0, length - 1]))
    return tokens[0, len(prompt) : len(prompt) + NEW].tolist()


@pytest.mark.parametrize(
    "case",
    ["llama-gqa", "mistral-sliding", "qwen2-mixed-sliding", "qwen3-tied", "phi4-mini", "gemma2", "smollm3-sliding"],
)
def test_cache_equals_recomputing(case, layout, tmp_path):
    decoder = load_path(write_model(tmp_path, raw_config(case)))
    lengths = (9, 3, 1)
    tokens, _ = sequences(96, lengths=lengths)
    together = greedy(decoder, tokens[:, :9], np.array(lengths), NEW)
    assert together == [recomputed(decoder, row[:length]) for row, length in zip(tokens, lengths, strict=True)]


def test_long_side_of_the_boundary(layout, tmp_path):
    decoder = load_path(write_model(tmp_path, raw_config("phi3-longrope")))
    tokens, _ = sequences(96, lengths=(17,))
    assert greedy(decoder, tokens[:, :17], np.array([17]), NEW) == [recomputed(decoder, tokens[0, :17])]


def test_crossing_the_boundary_computes_the_cache_anew(layout, tmp_path):
    """The boundary is at 16: one row passes it while it generates, one begins beyond it, one stays below."""
    decoder = load_path(write_model(tmp_path, raw_config("phi3-longrope")))
    lengths = (13, 17, 4)
    tokens, _ = sequences(96, lengths=lengths)
    expected = [recomputed(decoder, row[:length]) for row, length in zip(tokens, lengths, strict=True)]
    assert greedy(decoder, tokens[:, :17], np.array(lengths), NEW) == expected


def test_context_is_not_exceeded(tmp_path):
    decoder = load_path(write_model(tmp_path, raw_config("llama-gqa")))
    with pytest.raises(UserError, match="need 65 positions, the model has 64"):
        greedy(decoder, np.ones((1, 5), np.int32), np.array([5]), 60)


def test_stop_ends_each_row_by_itself(layout, tmp_path):
    decoder = load_path(write_model(tmp_path, raw_config("llama-gqa")))
    tokens, _ = sequences(96, lengths=(9, 5))
    prompts, lengths = tokens[:, :9], np.array([9, 5])
    free = greedy(decoder, prompts, lengths, NEW)
    stop = free[0][2]
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert greedy(decoder, prompts, lengths, NEW, stop=(stop,)) == expected
    assert expected[0] != free[0]


@pytest.mark.skipif(not (SHARED / "weights").is_dir(), reason=f"no checkpoints in {SHARED / 'weights'}")
def test_prompts_of_mixed_length_continue_as_alone():
    decoder = load_path(SHARED / "weights" / "stories260K-hf")
    prompts = [[1], [1, 410, 469, 347, 301, 262, 286], [1, 417]]
    tokens = np.zeros((3, 7), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    together = greedy(decoder, tokens, np.array([len(prompt) for prompt in prompts]), 60)
    for row, prompt in enumerate(prompts):
        assert greedy(decoder, np.array([prompt]), np.array([len(prompt)]), 60)[0] == together[row]


def test_edits_and_draws_are_those_of_the_stack(tmp_path, monkeypatch):
    decoder = load_path(write_model(tmp_path, raw_config("qwen2-mixed-sliding")))
    tokens, _ = sequences(96, lengths=(9, 4))
    sites = ("embed", "attn", "mlp", "block")  # at the embedding the data are those of all layers
    push = Edit(lambda site, before, after, data, positions: after + (data[0] if site == "embed" else data), sites)
    data = np.random.default_rng(0).standard_normal((decoder.config.num_layers, decoder.config.width)).astype("float32")
    found = {}
    for name, least in (("stack", 10**9), ("apart", 1)):
        monkeypatch.setattr(generation, "APART", least)
        given = {"edit": push, "edits": data, "sampling": Sampling(temperature=1.3), "seed": 3}
        found[name] = generate(decoder, tokens[:, :9], np.array([9, 4]), NEW, **given)
    assert found["stack"].token_ids == found["apart"].token_ids
    np.testing.assert_allclose(found["stack"].scores, found["apart"].scores, atol=1e-5)
    plain = generate(decoder, tokens[:, :9], np.array([9, 4]), NEW, sampling=Sampling(temperature=1.3), seed=3)
    assert plain.token_ids != found["apart"].token_ids


def test_a_step_over_blocks_apart_moves_no_weight(tmp_path):
    """Within the loop nothing of a weight's size is sliced, transposed or copied; over the stack it is."""
    decoder = load_path(write_model(tmp_path, raw_config("llama-gqa")))
    weight = min(decoder.blocks.gate[...][0].size, decoder.blocks.q[...][0].size)

    def moved(apart):
        prompts = generation.prefill(decoder, np.ones((1, 4), np.int32), np.array([4]), 2)
        program = generation.decode_step.lower(
            decoder,
            prompts.tokens,
            prompts.lengths,
            prompts.cache,
            np.zeros(0, np.int32),
            jax.random.key(0),
            np.zeros(1, np.int32),
            None,
            max_new_tokens=2,
            sampling=Sampling(),
            edit=None,
            mesh=None,
            apart=apart,
        )
        text = program.compile().as_text()
        parts = {part.split(" ", 1)[0].lstrip("%"): part for part in re.split(r"\n\n+", text)}
        todo, seen = re.findall(r"body=%?([\w.-]+)", text), set()
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += re.findall(r"(?:calls|to_apply|body)=%?([\w.-]+)", parts[name])
        lines = "\n".join(parts[name] for name in seen)
        ops = re.findall(r"= f32\[([\d,]+)\]\S* (copy|transpose|dynamic-slice|slice)\(", lines)
        return [op for shape, op in ops if np.prod([int(size) for size in shape.split(",")]) >= weight]

    assert moved(apart=False) and not moved(apart=True)


def softmax(scores):
    weights = np.exp(np.asarray(scores, np.float64) - np.max(scores))
    return weights / weights.sum()


def reference(scores, seen, options):
    """Distribution that transformers draws from: penalty, temperature, top-k, top-p; one row in float64."""
    scores = np.asarray(scores, np.float64)
    penalised = np.where(scores < 0, scores * options.repetition_penalty, scores / options.repetition_penalty)
    scores = np.where(seen, penalised, scores) / options.temperature
    if options.top_k:
        scores[scores < np.sort(scores)[-options.top_k]] = -np.inf
    order = np.argsort(-scores)
    before = np.cumsum(softmax(scores)[order]) - softmax(scores)[order]
    scores[order[before >= options.top_p]] = -np.inf  # the first that exceeds top_p together still counts
    return softmax(scores)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.7},
        {"repetition_penalty": 1.8},
        {"temperature": 1.6, "top_k": 7, "top_p": 0.8, "repetition_penalty": 0.6},
    ],
    ids=str,
)
def test_draws_have_the_distribution_asked_for(options):
    options = Sampling(**{"temperature": 1.0, **options})
    scores = np.random.default_rng(0).normal(0, 1.5, 12).astype(np.float32)
    seen = np.arange(12) % 3 == 0
    expected = reference(scores, seen, options)
    draws = 20_000
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(draws))
    rows = jnp.broadcast_to(scores, (draws, 12))
    counts = np.bincount(pick(rows, jnp.broadcast_to(seen, (draws, 12)), keys, options), minlength=12)
    possible = expected > 0
    assert not counts[~possible].any()
    assert stats.chisquare(counts[possible], draws * expected[possible]).pvalue > 0.01


def test_top_p_keeps_at_least_the_best():
    kept = restrict(jnp.array([[5.0, 0.0, 0.0]]), Sampling(temperature=1.0, top_p=1e-6))
    assert kept.tolist() == [[5.0, -np.inf, -np.inf]]


def test_generation_draws_from_the_model(tmp_path):
    """The first token of 3,000 samples of one prompt against the softmax of the full forward pass."""
    decoder = load_path(write_model(tmp_path, raw_config("llama-gqa")))
    tokens, _ = sequences(96, lengths=(9,))
    _, logits = states(decoder, tokens, np.array([9], np.int32))
    options = Sampling(temperature=2.0, top_k=8)
    expected = reference(logits[0, 8], np.zeros(96, bool), options)
    many = np.repeat(tokens[:, :9], 3000, axis=0)
    found = generate(decoder, many, np.full(3000, 9), 1, sampling=options, seed=3)
    np.testing.assert_allclose(found.scores[0], logits[0, 8], atol=1e-4)
    counts = np.bincount([row[0] for row in found.token_ids], minlength=96)
    assert not counts[expected == 0].any()
    assert stats.chisquare(counts[expected > 0], 3000 * expected[expected > 0]).pvalue > 0.01


def test_a_rows_draws_do_not_depend_on_its_batch(tmp_path):
    decoder = load_path(write_model(tmp_path, raw_config("llama-gqa")))
    lengths = np.array([9, 3, 5, 8])
    tokens, _ = sequences(96, lengths=tuple(lengths))
    options = {"sampling": Sampling(temperature=1.5, repetition_penalty=1.3), "seed": 7}
    together = greedy(decoder, tokens[:, :9], lengths, NEW, **options)
    turned = greedy(decoder, tokens[::-1, :9], lengths[::-1], NEW, samples=np.array([3, 2, 1, 0]), **options)
    alone = greedy(decoder, tokens[2:3, :5], lengths[2:3], NEW, samples=np.array([2]), **options)
    assert turned[::-1] == together and alone == together[2:3]
    assert greedy(decoder, tokens[:, :9], lengths, NEW, **{**options, "seed": 8}) != together


@pytest.mark.parametrize("mesh", ["data=4,tensor=2", "data=2,fsdp=2,tensor=2"])
def test_one_compile_per_bucket_and_the_same_tokens_on_a_mesh(mesh, tmp_path):
    raw = raw_config("llama-mha")
    decoder, mesh = load_path(write_model(tmp_path, raw)), make_mesh(parse_mesh(mesh))
    sharded = load_path(tmp_path, mesh=mesh)
    lengths = np.array([9, 3, 5, 8])
    tokens, _ = sequences(96, lengths=tuple(lengths))
    expected = greedy(decoder, tokens[:, :9], lengths, NEW)
    before = compiled_programs()
    assert greedy(sharded, tokens[:, :9], lengths, NEW, mesh=mesh) == expected
    greedy(sharded, tokens[:, 9:18], lengths[::-1], NEW, mesh=mesh, seed=5)
    assert compiled_programs() == (before[0] + 1, before[1] + 1)


def test_a_row_that_fills_up_is_not_waited_for(tmp_path):
    decoder = load_path(write_model(tmp_path, raw_config("llama-gqa")))
    tokens, _ = sequences(96, lengths=(9, 9))
    stop = greedy(decoder, tokens[:1, :9], np.array([9]), 1)[0]
    found = generate(decoder, tokens[:, :9], np.array([9, 9]), NEW, stop=stop, samples=np.array([0, -1]))
    assert found.token_ids[0] == [] and found.stopped.tolist() == [True, True]
    assert found.token_ids[1][1:] == [0] * (NEW - 1), "the loop ended with the row that counts"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "--temperature=-1.0"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top_p=0.0"),
        ({"temperature": 1.0, "top_k": -2}, "--top_k=-2"),
        ({"repetition_penalty": 0.0}, "--repetition_penalty=0.0"),
        ({"top_k": 5}, "give a --temperature above 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)
