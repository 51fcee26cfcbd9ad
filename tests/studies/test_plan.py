"""``jaxcrit plan``: shapes anywhere, and Llama-2-7B compiled for sixteen TPUs that are not here."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcrit.commands import main as cli
from jaxcrit.core.errors import UserError
from jaxcrit.criteria.registry import criterion
from jaxcrit.criteria.substitution import host_variant, variants, windows
from jaxcrit.data.templates import Example
from jaxcrit.evidence import forward as passing
from jaxcrit.evidence import reuse as reusing
from jaxcrit.evidence import variants as sweeping
from jaxcrit.models import generation
from jaxcrit.models.attention import ASKED
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.shapes import SHAPES, shape_of
from jaxcrit.models.weights import table
from jaxcrit.parallel.chips import Topology
from jaxcrit.parallel.mesh import make_mesh
from jaxcrit.studies.options import PlanOptions
from jaxcrit.studies.plan import fitting, needed_bytes, run_plan, tpus
from jaxcrit.studies.plan_jobs import program_of
from jaxcrit.studies.reuse import sets_to_try

GIB = 2**30
BLOCK = 4 * 4096**2 + 3 * 4096 * 11008  # of Llama-2-7B, without its norms
OUTSIDE = 32000 * 4096
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu: pip install -e '.[plan]'"
)


def plan(attention="auto", **asked):
    form = ASKED.set(attention)
    try:
        return run_plan(PlanOptions(**{"model": "llama2-7b", "mesh": "fsdp=4,tensor=4", **asked}))
    finally:
        ASKED.reset(form)


@needs_libtpu
@pytest.mark.parametrize(
    ("job", "layers", "most"),
    [
        ("analyze", "all", 1.4),
        ("finetune", "10-14", 3.6),
        ("finetune", "all", 10.5),
        ("substitute", "all", 2.6),
        ("generate", "all", 3.6),
    ],
)
def test_memory_of_a_compiled_job(job, layers, most):
    found = plan(job=job, layers=layers)
    assert found.topology.devices == 16 and found.fits and found.peak / GIB <= most
    assert found.compiled.collectives["all-gather"][1] > 0
    assert found.peak >= 0.98 * sum(found.memory.values())  # of a generation, analyses need no head
    if job in ("analyze", "finetune"):  # others keep more than the one program takes
        assert sum(found.memory.values()) == pytest.approx(found.compiled.arguments, rel=0.15)


@needs_libtpu
def test_a_program_too_large_says_by_how_much(capsys):
    arguments = ["plan", "--model=llama3.1-8b", "--topology=v5e:2x2", "--layers=all", "--batch_size=4"]
    assert cli.main(arguments) == 3
    out = capsys.readouterr().out
    assert "does not fit, by" in out and out.count("nothing on this topology") + out.count("would fit, by shapes") == 1


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        ("XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.", 20.5),
        ("the total memory required for HLO temporaries (32.68G) exceeds available HBM (15.75G).", 32.68 + 2),
    ],
)
def test_the_compiler_says_what_it_would_take(words, needed):
    assert needed_bytes(f"RESOURCE_EXHAUSTED: {words}", 2 * GIB, "v5e:2x2") == pytest.approx(needed * GIB)
    with pytest.raises(UserError, match="does not compile for v5e:2x2: INTERNAL"):
        needed_bytes("INTERNAL: something else", 0, "v5e:2x2")


def test_shapes_alone_know_what_stays_in_memory():
    """Critical-only: bf16 weights over 16 devices, float32 masters and two moments of five layers, to the byte."""
    found = plan(layers="10-14", compile=False)
    block, outside = BLOCK, 2 * OUTSIDE  # norms are whole on the tensor axis, so they stand apart
    norms = 4096 * (2 * 32 + 1)
    trained, moments = found.memory["weights"], found.memory["optimizer"]
    assert moments == pytest.approx(2 * 4 * 5 * block / 16, rel=1e-3)
    assert trained == pytest.approx((2 * (27 * block + outside) + 4 * 5 * block) / 16 + 2 * norms / 4, rel=1e-3)
    assert found.trained == 5 * (block + 2 * 4096)
    assert found.compiled is None and "as asked" in found.notes[0]
    tokens = 32 * 1024
    forward = 2 * tokens * (32 * block + 32000 * 4096) + 32 * 4 * 32 * 1024**2 * 4096
    # Forward whole, again above the lowest trained layer (remat), gradients there: between 2 and 4 forwards.
    assert 2 < found.flops * 16 / forward < 4


def test_substitution_keeps_both_models_and_runs_every_window_from_where_it_departs():
    found, once = plan(job="substitute", compile=False), plan(job="analyze", compile=False)
    assert found.memory["weights"] == 2 * once.memory["weights"]
    assert found.memory["hidden states"] == 2 * 2 * 32 * 1024 * 4096 / 4
    evaluations = sum(32 - start for start in range(28)) + 32 + 32  # of 28 windows, and both models as they are
    block = 2 * 32 * 1024 * BLOCK + 4 * 32 * 1024**2 * 4096
    assert found.flops * 16 == evaluations * block + 30 * 2 * 32 * 1024 * OUTSIDE
    assert plan(job="substitute", window=1, compile=False).flops > found.flops


def test_generation_keeps_a_cache_and_reads_the_weights_for_every_token():
    found, once = plan(job="generate", compile=False), plan(job="analyze", compile=False)
    assert found.memory["cache"] == 2 * 2 * 32 * 32 * (1024 + 64) * 4096 / 16
    assert found.moved == 65 * (4 * found.memory["weights"] + found.memory["cache"])  # gathered from 4 devices
    step = 2 * 32 * (32 * BLOCK + OUTSIDE) + 32 * 4 * 32 * (1024 + 64) * 4096
    prompts = once.flops * 16 + 32 * 4 * 32 * 1024 * 64 * 4096  # attention sees the places of the new tokens too
    assert found.flops * 16 == prompts + 64 * step
    grouped = plan(job="generate", model="llama3.1-8b", mesh="fsdp=4,tensor=4", compile=False)
    assert grouped.memory["cache"] == found.memory["cache"] / 4  # 8 heads of 32


def test_screening_is_a_pass_and_reuse_holds_both_models_and_every_stream():
    once, screen, reuse = (plan(job=job, compile=False) for job in ("analyze", "screen", "reuse"))
    assert screen.memory == once.memory
    assert screen.flops * 16 == once.flops * 16 + 2 * 32 * OUTSIDE  # the head at the last token of each prompt
    assert reuse.memory["weights"] == 2 * once.memory["weights"]
    head, tail, variants_of = 819, 1024 - 819 + 64, 1 + 32 + 1 + 32 * 33 // 2 + 20
    assert reuse.memory["keys and values"] == 33 * 2 * 2 * 32 * (1024 + 64) * 4096 / 16
    assert reuse.memory["hidden states"] == 2 * 32 * 4096 * (33 * head + variants_of * (tail + 64)) / 4
    with pytest.raises(UserError, match="needs 4154 positions, the model has 4096"):
        plan(job="reuse", length=4090, compile=False)


def test_the_covariance_of_an_edit_is_kept_of_its_layers_alone():
    """A pass up to the highest layer; of each layer a square of the feed-forward width, in float32, on every device."""
    some, every = (plan(job="edit", layers=layers, compile=False) for layers in ("4,8", "all"))
    assert some.memory["covariance"] == 2 * 4 * 11008**2 and every.memory["covariance"] == 32 * 4 * 11008**2
    products = 2 * 32 * 1024 * 11008**2
    assert every.flops * 16 > some.flops * 16 * 32 / 9 + 20 * products
    with pytest.raises(UserError, match="in gemma2 models a norm stands behind the MLP"):
        plan(job="edit", model="gemma2-2b", mesh="fsdp=16", compile=False)


@pytest.mark.parametrize(("name", "weights"), [("gemma2-2b", 2_614_341_888), ("gemma3-1b", 999_885_952)])
def test_models_whose_layers_differ_are_planned_too(name, weights):
    asked = {"model": name, "mesh": "fsdp=16", "compile": False}
    assert plan(layers="all", train_norms=True, train_embeddings=True, train_head=True, **asked).trained == weights
    for job in ("analyze", "substitute", "generate", "screen", "reuse"):
        assert plan(job=job, **asked).flops > 0


def test_adapters_train_alone():
    found = plan(lora_rank=16, lora_targets="q,v", compile=False)
    assert found.trained == 32 * 2 * 16 * (4096 + 4096)
    assert found.memory["optimizer"] < 0.01 * plan(compile=False).memory["optimizer"]
    assert plan(train_head=True, compile=False).trained - plan(compile=False).trained == OUTSIDE


def test_objectives_beside_the_loss_are_planned():
    """An exit at the last layer on rows of its own is the step again; one at the middle has half the blocks of it."""
    asked = ("", "15:logits:x", "31:logits:x", "31:logits:x,15:logits:x")
    once, half, twice, shared = (plan(compile=False, supervise=one) for one in asked)
    assert twice.flops == 2 * once.flops
    head = 2 * half.flops - 3 * once.flops  # which runs whole either way
    assert 0 < head < once.flops
    assert shared.flops == twice.flops + head  # read twice off one pass
    assert twice.temporaries > half.temporaries > once.temporaries
    searched = [plan(compile=False, layers="0-1", adversarial=0.1, adversarial_steps=steps) for steps in (1, 2, 4)]
    steps = np.diff([one.flops for one in searched])
    assert steps[1] == 2 * steps[0] > 0
    with pytest.raises(UserError, match="nothing at or below layer 3 trains"):
        plan(compile=False, layers="10-14", supervise="3")


def _shapes(tree):
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


@pytest.fixture
def tiny(monkeypatch):
    """Programs of a small model, their arguments as arrays of zeros, and what the commands' functions are given."""
    model = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 6,
            "vocab_size": 40,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "eos_token_id": 2,
        }
    )
    seen = []

    def watch(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, **more: seen.append((name, given)) or real(*given, **more))

    def of(job, **asked):
        program = program_of(
            model,
            PlanOptions(job=job, batch_size=4, length=8, dtype="float32", **asked),
            make_mesh(None, jax.devices()[:1]),
        )
        return program, [
            jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), unit.arguments[:4]) for unit in program.units
        ]

    return model, of, watch, seen


def test_a_substitution_calls_what_is_planned_as_often_as_planned(tiny):
    _, of, watch, seen = tiny
    program, ((blocks, *_), (outside, _, rows)) = of("substitute", window=3)
    watch(sweeping, "span_step"), watch(sweeping, "loss_step")
    host, guest = (host_variant(6, base=base) for base in (False, True))
    batch = dataclasses.replace(rows, lengths=jnp.full(4, 8, jnp.int32))
    chosen = [*variants(list(windows(6, 3).values()), 6), host]
    done = [sweeping.sweep(blocks, outside, one, some, batch) for one, some in ((host, chosen), (guest, [guest]))]
    span, losses = program.units
    assert sum(one.evaluations for one in done) == span.turns
    spans, lost = ([given for called, given in seen if called == name] for name in ("span_step", "loss_step"))
    assert len(lost) == losses.runs
    assert all(_shapes(given[:6]) == _shapes(span.arguments) for given in spans)
    assert all(_shapes(given[:3]) == _shapes(losses.arguments) for given in lost)


def test_reuse_calls_what_is_planned_as_often_as_planned(tiny):
    _, of, watch, seen = tiny
    program, ((blocks, _, before, _), (_, _, behind, *_), (decoder, scored, *_)) = of("reuse", max_new_tokens=3)
    for name in ("read_step", "answer_step", "compare_step"):
        watch(reusing, name)
    head, tail, places = before.shape[1], behind.shape[1], scored.shape[1]
    assert (head, tail, places) == (6, 5, 3) and _shapes(decoder.blocks) == _shapes(blocks)
    tokens = [jnp.zeros((4, length), jnp.int32) for length in (head, tail, places)]
    lengths = jnp.full(4, head, jnp.int32)
    rows = reusing.Rows(tokens[0], lengths, tokens[1], lengths + tail, tokens[2], tokens[2] == 0)
    plan = sets_to_try(6, 20, 0).plan
    reusing.measure(decoder, decoder, rows, plan, make_mesh(None, jax.devices()[:1]))
    for unit, name in zip(program.units, ("read_step", "answer_step", "compare_step"), strict=True):
        calls = [given for called, given in seen if called == name]
        assert len(calls) == unit.runs, name
        assert {str(_shapes(given[: len(unit.arguments)])) for given in calls} == {str(_shapes(unit.arguments))}
    counted = program.kinds
    assert len(counted["keys and values"]) == 7 and len(counted["hidden states"][1]) == len(plan)


def test_screening_calls_what_is_planned(tiny):
    _, of, watch, seen = tiny
    program, ((decoder, *_),) = of("screen")
    watch(passing, "pass_step")
    rows = [Example(str(row), np.ones(8, np.int32), 8, "", None) for row in range(4)]
    asked = {"cohesion_rise": criterion("cohesion_rise")}
    where = types.SimpleNamespace(config=decoder.config, mesh=make_mesh(None, jax.devices()[:1]))
    passing.forward_pass(where, decoder, rows, 4, asked)
    ((_, given),) = seen
    assert _shapes(given) == _shapes(program.units[0].arguments)


def test_a_generation_calls_what_is_planned(tiny):
    model, of, watch, seen = tiny
    program, ((decoder, tokens, _), _) = of("generate", max_new_tokens=5)
    watch(generation, "prefill_step"), watch(generation, "decode_step")
    generation.generate(decoder, np.asarray(tokens), np.full(4, 8), 5, stop=model.eos_token_ids)
    (first, filled), (second, decoded) = seen
    fill, go_on = program.units
    assert (first, second, go_on.turns) == ("prefill_step", "decode_step", 5)
    assert _shapes(filled[:3]) == _shapes(fill.arguments)
    assert _shapes(decoded[:7]) == _shapes(go_on.arguments)


def test_gpus_are_planned_by_shapes(capsys):
    assert cli.main(["plan", "--model=llama2-7b", "--topology=h100:8", "--layers=all"]) == 0
    out = capsys.readouterr().out
    assert "of 78.75 usable: fits" in out and "no compiler for GPUs" in out and max(map(len, out.splitlines())) <= 100


def test_a_plan_says_how_attention_is_computed(capsys):
    """Without scores long rows need less; where no kernel goes the reason is told, and a name is refused."""
    long = {"job": "analyze", "model": "llama3.1-8b", "length": 8192, "compile": False}
    kernel, scores = plan(**long), plan(**long, attention="reference")
    assert (kernel.attention[0], scores.attention[0]) == ("splash", "reference")
    # 8 rows x 8 heads on a device, two float32 scores for each pair of tokens.
    assert kernel.temporaries < 2 * 4 * 8 * 8 * 8192**2 < scores.temporaries
    assert kernel.flops == scores.flops
    assert cli.main(["plan", "--model=llama2-7b", "--topology=h100:8", "--dtype=float32", "--layers=10-14"]) in (0, 3)
    assert "attention: reference (the kernel computes in bfloat16 or float16, got float32)" in capsys.readouterr().out
    with pytest.raises(UserError, match="the kernel is for cuda, got tpu"):
        plan(**long, attention="cudnn")


def test_what_does_not_fit_exits_3_and_names_what_would(capsys):
    arguments = ["plan", "--model=llama3.1-70b", "--topology=h100:8", "--layers=10-14", "--batch_size=512"]
    assert cli.main(arguments) == 3
    out = capsys.readouterr().out
    assert "does not fit, by" in out
    mesh, batch = out.split("--mesh=")[1].split(" --batch_size=")
    config = PlanOptions(model="llama3.1-70b", topology="h100:8", layers="10-14", mesh=mesh, batch_size=int(batch))
    assert run_plan(config).fits
    assert fitting(plan(model="llama3.1-70b", topology="v5e:1x1", mesh="", compile=False)) is None


def test_search_takes_the_fastest_that_fits():
    found = plan(topology="h100:8", search=True, layers="10-14", mesh="")
    whole = plan(topology="h100:8", layers="10-14", mesh="fsdp=8")
    assert found.fits
    assert max(found.seconds.values()) / found.config.batch_size <= max(whole.seconds.values()) / 32


def test_a_directory_is_a_shape_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["llama2-7b"]))
    named, read = plan(compile=False), plan(compile=False, model=str(tmp_path))
    assert (named.memory, named.flops) == (read.memory, read.flops)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"model": "llama2-7"}, "did you mean 'llama2-7b'"),
        ({"model": "nowhere"}, "expected a directory with a config.json or one of"),
        ({"topology": "v5:4x4"}, "did you mean 'v5"),
        ({"topology": "v9:4"}, "expected a name such as v5e:4x4"),
        ({"topology": "h100:2y"}, "expected a name such as v5e:4x4"),
        ({"topology": "v5e"}, "how many"),
        ({"topology": "v5e-5"}, "no such slice; nearest: v5e:2x2"),
        ({"topology": "v5p-7"}, "counts cores"),
        ({"topology": "tpu7x-8"}, "chips or cores"),
        ({"topology": "gpu:2"}, "give --memory too"),
        ({"topology": "h100", "memory": "much"}, "--memory=much: expected gibibytes"),
        ({"mesh": "dp=2,pp=8"}, "pp: layers are not parted over devices"),
        (
            {"model": "tinyllama-1.1b", "job": "analyze", "topology": "gpu", "memory": "1", "mesh": "", "search": True},
            r"a device needs \d+.\d\d GiB .* of the 0.98 GiB",
        ),
        ({"topology": "h100:0"}, "at least one chip"),
        ({"mesh": "fsdp=3"}, "product is 16"),
        ({"mesh": "fsdp=1,tensor=16", "model": "qwen2.5-7b"}, "heads of size 28 does not divide"),
        ({"batch_size": 3}, "does not divide over data.fsdp=4"),
        ({"job": "finetun"}, "did you mean 'finetune'"),
        ({"layers": "critical:5"}, "name layers"),
        ({"topology": "v5e:4x5"}, "no such slice; nearest: v5e:4x4"),
        ({"topology": "v5p:9"}, "nearest: v5p:2x2x2"),
        ({"job": "substitute", "window": 4}, "expected an odd number"),
        ({"job": "substitute", "window": 4, "search": True}, "expected an odd number"),
        ({"job": "generate", "length": 4090}, "needs 4154 positions, the model has 4096"),
        ({"lora_rank": 4, "lora_targets": "querry"}, "--lora_targets=querry"),
    ],
)
def test_mistakes(asked, message):
    with pytest.raises(UserError, match=message):
        plan(compile=False, **asked)


def test_without_libtpu_shapes_answer(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = plan(layers="10-14")
    assert found.compiled is None and "pip install 'jaxcrit[plan]'" in found.notes[0]


def test_topologies_multiply():
    names = ("v5e:4x4", "v5p:4x4x4", "h200:2x8", "h100:8", "tpu7x:2x2x1")  # a tpu7x chip is two devices
    assert [Topology.parse(name).devices for name in names] == [16, 64, 16, 8, 8]


@pytest.mark.parametrize(
    ("spelled", "name", "memory"),
    [
        *((one, "v5e:2x4", 16) for one in ("v5e-8", "v5litepod-8", "V5E:8", "tpu-v5e-8", "v5e:2x4")),
        *((one, "v5p:2x2x2", 95) for one in ("v5p-16", "v5p:8")),  # the former counts cores
        *((one, "h100:1", 80) for one in ("h100", "H100", "H100 SXM", "NVIDIA H100 80GB HBM3")),
        *((one, "rtx4090:1", 24) for one in ("4090", "rtx4090", "RTX 4090", "NVIDIA GeForce RTX 4090")),
        *((one, "a100:1", 80) for one in ("a100", "a100-80gb", "NVIDIA A100-SXM4-80GB")),
        ("A100-40GB", "a100-40gb:1", 40),
        ("v5e:1", "v5e:1x1", 16),
        ("tpu7x:4", "tpu7x:2x2x1", 96),
        ("l4:4", "l4:4", 24),
    ],
)
def test_chips_have_many_names(spelled, name, memory):
    found = Topology.parse(spelled)
    assert (found.name, found.chip.memory / GIB) == (name, memory)


def test_the_memory_of_a_gpu_may_be_given(capsys):
    assert [Topology.parse("gpu:2", size).chip.memory / GIB for size in ("24GiB", "24GB", "24")] == [24] * 3
    assert Topology.parse("h100", "40GiB").chip.memory == 40 * GIB
    assert cli.main(["plan", "--model=llama3.2-1b", "--topology=gpu:2", "--memory=12GiB", "--layers=3-5"]) in (0, 3)
    out = capsys.readouterr().out
    assert "of 11.81 usable: fits" in out and "no faster than" not in out  # nobody knows how fast it is


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("meta-llama/Llama-3.1-8B", "llama3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-70B-Instruct", "llama3.1-70b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama2-7b"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tinyllama-1.1b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"),
        ("mistralai/Mixtral-8x7B-v0.1", "mixtral-8x7b"),
        ("microsoft/Phi-3-mini-4k-instruct", "phi3-mini"),
        ("google/gemma-2-2b-it", "gemma2-2b"),
        ("allenai/OLMo-2-1124-7B", "olmo2-7b"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b"),
        ("meta-llama/Llama-3.1-405B", ""),
        ("somebody/merged-8B", ""),
    ],
)
def test_names_of_a_hub_are_shapes(name, shape):
    assert shape_of(name) == shape


def test_advice_is_of_the_job_and_devices_go_by_the_names_of_others(capsys):
    assert plan(mesh="dp=2,tp=8", compile=False).mesh == {"data": 2, "fsdp": 1, "tensor": 8}
    for job, told in (("analyze", False), ("finetune", True)):
        assert cli.main(["plan", "--model=llama3.1-70b", "--topology=h100", f"--job={job}"]) == 3
        out = capsys.readouterr().out
        assert ("fewer --layers" in out) == told and "of the 78.75 GiB that one has" in out


@needs_libtpu
def test_the_compiler_counts_devices_as_we_do():
    for name in ("v4:2x2x1", "v5p:2x2x1", "v6e:2x4", "tpu7x:2x2x1", "v5e:1x1"):
        assert len(tpus(name)) == Topology.parse(name).devices, name


@pytest.mark.parametrize(
    ("shape", "weights", "used"),
    [("olmoe-1b-7b", 6.92e9, 1.28e9), ("qwen3-30b-a3b", 30.53e9, 3.35e9), ("mixtral-8x7b", 46.70e9, 12.88e9)],
)
def test_mixtures_by_their_published_sizes(shape, weights, used):
    """Weights in all and those that a token meets, as the models' cards say; operations are counted of the latter."""
    config = ModelConfig.from_hf(SHAPES[shape])
    sizes = {row.path: math.prod(row.shape(config)) for row in table(config)}
    assert sum(sizes.values()) == pytest.approx(weights, rel=2e-3)
    of_experts = sum(size for path, size in sizes.items() if path in ("blocks.gate", "blocks.up", "blocks.down"))
    met = sum(sizes.values()) - of_experts * (1 - config.experts_per_token / config.experts)
    assert met == pytest.approx(used, rel=5e-3)
    plan = run_plan(
        PlanOptions(model=shape, job="analyze", topology="v5e:4x4", batch_size=16, length=128, compile=False)
    )
    products = 2 * 16 * 128 * (met - sizes["embed"] - sizes["head"])
    assert plan.flops * 16 == pytest.approx(products, rel=0.1)  # and those of attention itself
