"""Kernels against the reference form, the TPU's interpreted on CPU; and which form is taken."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from support.family_models import error, load_path, one_device, raw_config, write_model

from jaxcrit.commands import main as cli
from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import ProcessOptions
from jaxcrit.core.options import options_of
from jaxcrit.models import attention
from jaxcrit.models.attention import REFERENCE, Attention, attend, attend_by_scores, choose_attention
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Decoder, abstract, forward
from jaxcrit.models.generation import generate
from jaxcrit.parallel.accounting import product_flops
from jaxcrit.parallel.mesh import make_mesh

LENGTH = 140  # padded to two tiles


@pytest.fixture
def interpreted(monkeypatch):
    """Splash attention without a TPU, in tiles of 128."""
    make = functools.partial(splash_attention_kernel.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", make)
    monkeypatch.setattr(attention, "_TILES", (128,))


def by(decoder: Decoder, how: Attention) -> Decoder:
    """The decoder, with attention computed so."""
    return Decoder(dataclasses.replace(decoder.config, attention=how), decoder.weights())


def rows(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens ``[count, LENGTH]``, and which are real."""
    tokens = np.random.RandomState(0).randint(0, 96, (count, LENGTH)).astype(np.int32)
    lengths = np.linspace(40, LENGTH, count).astype(np.int32)
    return tokens, np.arange(LENGTH) < lengths[:, None]


@jax.jit
def loss_and_gradient(decoder, tokens, real):
    def loss(decoder):
        hidden = forward(decoder, tokens).hidden
        return jnp.mean(jnp.where(real[..., None], hidden, 0) ** 2), hidden

    (_, hidden), gradient = jax.value_and_grad(loss, has_aux=True)(decoder)
    return hidden, gradient


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        ("qwen2-mixed-sliding", None),  # two key heads for four, layers with and without a window in one scan
        ("mistral-mqa", {"data": 2, "fsdp": 2, "tensor": 2}),  # one key head for two devices
    ],
)
def test_splash_is_the_reference_form(interpreted, tmp_path, case, sizes):
    """States of real tokens and every weight's gradient, with padding behind most rows."""
    mesh = one_device() if sizes is None else make_mesh(sizes)
    decoder = load_path(write_model(tmp_path, raw_config(case)), mesh=mesh)
    tokens, real = rows(4)
    expected, slopes = loss_and_gradient(decoder, tokens, real)
    found, ours = loss_and_gradient(by(decoder, Attention("splash", "tpu", mesh)), tokens, real)
    assert error(np.asarray(found)[real], np.asarray(expected)[real]) < 1e-5
    for path in ("embed", "blocks.q", "blocks.k", "blocks.v", "blocks.o"):
        assert error(np.asarray(ours.weights()[path]), np.asarray(slopes.weights()[path])) < 2e-5, path


@pytest.mark.parametrize("case", ["qwen2-mixed-sliding", "gemma2"])
def test_blocks_are_the_reference_form(tmp_path, case):
    """States of real tokens and gradients: layers with and without windows in one scan, soft caps."""
    decoder = load_path(write_model(tmp_path, {**raw_config(case), "max_position_embeddings": 256}))
    tokens, real = rows(4)
    expected, slopes = loss_and_gradient(decoder, tokens, real)
    found, ours = loss_and_gradient(by(decoder, Attention("blocks")), tokens, real)
    assert error(np.asarray(found)[real], np.asarray(expected)[real]) < 1e-5
    for path in ("embed", "blocks.q", "blocks.k", "blocks.v", "blocks.o"):
        assert error(np.asarray(ours.weights()[path]), np.asarray(slopes.weights()[path])) < 2e-5, path


def test_blocks_keep_packed_rows_apart_and_see_windows_on_a_mesh_too():
    q, k, v = (
        jax.random.normal(key, (2, LENGTH, heads, 16))
        for key, heads in zip(jax.random.split(jax.random.key(0), 3), (6, 3, 3), strict=True)
    )
    segments = np.repeat([1, 2, 3], [30, 100, 10])[None].repeat(2, axis=0).astype(np.int32)
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    visible = (segments[:, :, None] == segments[:, None, :]) & (distance >= 0) & (distance < 70)
    expected = attend_by_scores(q, k.swapaxes(1, 2), v.swapaxes(1, 2), visible, None, 5.0)
    asked = {"windows": (70, None), "window": jnp.int32(70), "segments": segments, "cap": 5.0}
    for mesh in (None, make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])):
        assert error(np.asarray(attend("blocks", q, k, v, mesh=mesh, **asked)), np.asarray(expected)) < 1e-6


@pytest.mark.parametrize(("window", "share"), [(None, 0.57), (128, 0.25)])
def test_blocks_hold_no_square_and_multiply_nothing_that_cannot_be_seen(window, share):
    """Of 1,024 tokens in 8 blocks: (1 + ... + 8) / 64 of the products, less where a window ends."""
    length, heads = 1024, 9
    q, kv = (jax.ShapeDtypeStruct((2, length, count, 64), jnp.float32) for count in (heads, 3))

    def whole(q, k, v):
        return attend_by_scores(q, k.swapaxes(1, 2), v.swapaxes(1, 2), np.tri(length, dtype=bool)[None], None, None)

    def by_blocks(q, k, v):
        return attend("blocks", q, k, v, windows=(window,), window=window and jnp.int32(window))

    def slopes(form):
        return jax.grad(lambda *x: form(*x).sum(), (0, 1, 2))

    for make in (lambda form: form, slopes):
        assert product_flops(make(by_blocks), q, kv, kv) <= share * product_flops(make(whole), q, kv, kv)
        ours, theirs = (jax.jit(make(form)).lower(q, kv, kv).compile() for form in (by_blocks, whole))
        shapes = re.findall(r"= \w+\[([\d,]+)\]", ours.as_text())
        most = max(np.prod([int(size) for size in shape.split(",")]) for shape in shapes)
        assert most <= 2 * heads * length * length / 4
        memory = [one.memory_analysis().temp_size_in_bytes for one in (ours, theirs)]
        assert memory[0] <= (0.7 if window is None else 0.4) * memory[1]


def test_splash_keeps_packed_rows_apart(interpreted):
    q, k, v = (
        jax.random.normal(key, (1, LENGTH, heads, 96))
        for key, heads in zip(jax.random.split(jax.random.key(0), 3), (2, 1, 1), strict=True)
    )
    segments = np.repeat([1, 2, 3], [50, 60, 30])[None].astype(np.int32)
    found = attend("splash", q, k, v, segments=segments)
    visible = (segments[:, :, None] == segments[:, None, :]) & np.tri(LENGTH, dtype=bool)
    expected = jax.nn.dot_product_attention(q, k, v, mask=visible[:, None])
    assert error(np.asarray(found), np.asarray(expected)) < 1e-5


def test_splash_scales_and_caps_scores_as_the_reference_form_does(interpreted):
    q, k, v = (
        2 * jax.random.normal(key, (1, LENGTH, heads, 16))
        for key, heads in zip(jax.random.split(jax.random.key(0), 3), (4, 2, 2), strict=True)
    )
    visible, heads_first = np.tri(LENGTH, dtype=bool)[None], (k.swapaxes(1, 2), v.swapaxes(1, 2))
    expected = attend_by_scores(q, *heads_first, visible, 0.3, 4.0)
    assert error(np.asarray(attend("splash", q, k, v, scale=0.3, cap=4.0)), np.asarray(expected)) < 1e-5
    for scale, cap in ((None, 4.0), (0.3, None)):
        assert error(np.asarray(attend_by_scores(q, *heads_first, visible, scale, cap)), np.asarray(expected)) > 0.01


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_highest_precision_is_of_float32_alone(interpreted, dtype):
    """Mosaic compiles no product of bfloat16 at ``highest``, in either direction."""
    q, k, v = (jax.random.normal(key, (1, LENGTH, 2, 64), dtype) for key in jax.random.split(jax.random.key(0), 3))
    segments = np.zeros((1, LENGTH), np.int32)

    def slopes(q, k, v):
        return jax.grad(lambda *x: attend("splash", *x, segments=segments).astype(jnp.float32).sum(), (0, 1, 2))(
            q, k, v
        )

    found = slopes(q, k, v)
    with jax.default_matmul_precision("highest"):
        program = str(jax.make_jaxpr(slopes)(q, k, v))
        asked = slopes(q, k, v)
    assert ("Precision.HIGHEST" in program) == (dtype == jnp.float32)
    for ours, theirs in zip(asked, found, strict=True):
        assert error(np.asarray(ours, np.float32), np.asarray(theirs, np.float32)) < 1e-5


def test_prompts_go_through_the_kernel_and_answers_through_the_cache(interpreted, tmp_path):
    decoder = load_path(write_model(tmp_path, {**raw_config("llama-gqa"), "max_position_embeddings": 256}))
    tokens, real = rows(2)
    lengths = real.sum(axis=1).astype(np.int32)
    expected = generate(decoder, tokens, lengths, 4)
    found = generate(by(decoder, Attention("splash", "tpu")), tokens, lengths, 4)
    assert found.token_ids == expected.token_ids
    assert error(np.asarray(found.scores), np.asarray(expected.scores)) < 1e-5
    assert not np.array_equal(found.scores, expected.scores)  # another form, so another order of sums


@pytest.mark.parametrize(("head_dim", "window"), [(64, None), (96, 2048), (128, None)])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_kernels_lower_without_their_device_and_hold_no_scores(monkeypatch, platform, head_dim, window):
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    form, call = {"tpu": ("splash", "tpu_custom_call"), "cuda": ("cudnn", "cudnn$fmha")}[platform]
    length = 4096
    q, kv = (jax.ShapeDtypeStruct((2, length, heads, head_dim), jnp.bfloat16) for heads in (4, 2))

    def slopes(q, k, v):
        window_of = None if window is None else jnp.int32(window)
        return jax.grad(
            lambda *x: attend(form, *x, windows=(window,), window=window_of).astype(jnp.float32).sum(), (0, 1, 2)
        )(q, k, v)

    # The calls have no promise of compatibility, which nobody who only reads the program needs.
    unsafe = [jax.export.DisabledSafetyCheck.custom_call(f"__cudnn$fmhaSoftmax{way}") for way in ("", "Backward")]
    exported = jax.export.export(jax.jit(slopes), platforms=[platform], disabled_checks=unsafe)(q, kv, kv)
    text = exported.mlir_module()
    assert text.count(call) >= 2
    assert not re.search(rf"tensor<(\d+x)*{length}x{length}x", text)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("case", ["qwen2-mixed-sliding", "mistral-mqa"])
def test_cudnn_is_the_reference_form(tmp_path, case):
    decoder = load_path(write_model(tmp_path, raw_config(case), "bfloat16"))
    tokens, real = rows(4)
    expected, slopes = loss_and_gradient(decoder, tokens, real)
    found, ours = loss_and_gradient(by(decoder, Attention("cudnn", "cuda")), tokens, real)
    assert error(np.asarray(found, np.float32)[real], np.asarray(expected, np.float32)[real]) < 0.05
    for path in ("embed", "blocks.q", "blocks.k", "blocks.v", "blocks.o"):
        got, slope = (np.asarray(one.weights()[path], np.float32) for one in (ours, slopes))
        assert error(got, slope) < 0.1, path


USUAL = {"dtype": "bfloat16", "rows": 8, "length": 2048, "heads": 32, "head_dim": 128}


@pytest.mark.parametrize(
    ("platform", "changed", "form", "why"),
    [
        ("tpu", {}, "splash", ""),
        ("cuda", {}, "cudnn", ""),
        ("cpu", {}, "blocks", ""),
        ("cpu", {"dtype": "float16", "head_dim": 20, "capped": True, "packed": True}, "blocks", ""),
        ("cpu", {"length": 127}, "reference", "shorter than 128"),
        ("cpu", {"rows": 3}, "reference", "3 rows and 32 heads do not divide"),
        ("gpu", {}, "reference", "no kernel for gpu"),  # of another maker, or too old
        ("tpu", {"length": 256}, "reference", "shorter than 512"),
        ("tpu", {"dtype": "float32"}, "splash", ""),
        ("cuda", {"dtype": "float32"}, "reference", "computes in bfloat16 or float16, got float32"),
        ("cuda", {"head_dim": 256}, "reference", "at most 128, got 256"),
        ("cuda", {"packed": True}, "reference", "no packed rows"),
        ("cuda", {"capped": True}, "reference", "no soft cap on scores"),
        ("tpu", {"capped": True}, "splash", ""),
        ("tpu", {"packed": True}, "splash", ""),
        ("tpu", {"head_dim": 20}, "reference", "multiple of 8"),
        ("tpu", {"rows": 3}, "reference", "3 rows and 32 heads do not divide"),
    ],
)
def test_auto_takes_a_kernel_where_one_goes(platform, changed, form, why):
    asked = {**USUAL, **changed}
    mesh = make_mesh({"data": 2, "tensor": 4})
    found, reason = choose_attention(Attention("auto", platform, mesh), **asked)
    assert (found, bool(reason)) == (form, bool(why)) and why in reason
    assert choose_attention(REFERENCE, **asked) == ("reference", "")
    if platform in ("tpu", "cuda") and form == "reference" and "length" not in changed:
        name = {"tpu": "splash", "cuda": "cudnn"}[platform]
        with pytest.raises(UserError, match=rf"--attention={name}: .*{re.escape(why)}.*; use --attention=auto"):
            choose_attention(Attention(name, platform, mesh), **asked)


def test_a_form_by_name_goes_for_short_rows_too_but_not_elsewhere():
    assert choose_attention(Attention("splash", "tpu"), **{**USUAL, "length": 16})[0] == "splash"
    with pytest.raises(UserError, match=r"--attention=splash: the kernel is for tpu, got cpu; use --attention=auto"):
        choose_attention(Attention("splash", "cpu"), **USUAL)


def test_a_model_does_not_lose_its_form():
    config = dataclasses.replace(ModelConfig.from_hf(raw_config("llama-gqa")), attention=Attention("splash", "cpu"))
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    with pytest.raises(UserError, match="the kernel is for tpu, got cpu"):
        jax.eval_shape(forward, abstract(config), tokens)


def test_a_form_that_does_not_go_ends_a_command_before_it_reads_weights(capsys):
    assert cli.main(["analyze", "--attention=splash"]) == 2
    assert capsys.readouterr().err.count("the kernel is for tpu, got cpu; use --attention=auto") == 1
    assert attention.ASKED.get() == "auto"  # of that command alone
    flag = next(flag for flag in options_of(ProcessOptions) if flag.name == "attention")
    assert flag.choices == attention.FORMS


def test_a_run_says_which_form_it_took(tmp_path):
    assert cli.main(["generate", f"--out={tmp_path}", "--limit=1", "--max_new_tokens=1"]) == 0
    assert json.loads((tmp_path / "run.json").read_text())["attention"] == "blocks"
