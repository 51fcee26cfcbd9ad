"""How attention is computed: from all scores of a row at once, or by a kernel that holds a tile of them.

The reference form is the decoder's own, and the rule for every other: it goes everywhere, and needs ``B H T²`` scores
in float32. cuDNN's flash attention (GPU) and splash attention (TPU) need none, in the backward pass either. On CPUs
``blocks`` takes a block of queries at a time and multiplies it with the keys that it may see, so neither a ``T²`` array
nor the half of it that causality throws away is computed: at 9 heads of 64, from 136 tokens on, a layer's forward pass
takes 0.4 to 0.6 of the time of the reference form, its gradient 0.5 to 0.8. All of them go by the order of the tokens
in a row, and rows are right padded, so nothing of the padding is visible to a real token.
XLA cannot split a kernel, so on a mesh each device runs it on its own rows and heads. Tokens that follow others in a
cache always take the reference form: one query has few scores.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxcrit.core.errors import UserError
from jaxcrit.parallel.mesh import RULES, AnyMesh

FORMS = ("auto", "reference", "blocks", "cudnn", "splash")
ASKED: ContextVar[str] = ContextVar("attention", default="auto")  # by --attention, of every model opened from then on
_PLATFORMS = {"cudnn": "cuda", "splash": "tpu", "blocks": "cpu"}
_DTYPES = {"cudnn": ("bfloat16", "float16"), "splash": ("bfloat16", "float32")}
_WIDEST_HEAD = {"cudnn": 128, "splash": 256}
# On accelerators, from here on scores are more than the inside of the MLP: 8 H T > 6 F, T > 258 for Llama-2-7B. On
# CPUs shorter rows would be one block.
_SHORTEST = {"cudnn": 512, "splash": 512, "blocks": 128}
# Queries of a block: an eighth of the row within these bounds, so that long rows compile quickly.
_BLOCKS = 64, 256
_TILES = (512, 256, 128)


@dataclasses.dataclass(frozen=True)
class Attention:
    """Which form a model is to take; static.

    Attributes:
        asked: one of `FORMS`.
        platform: platform of the devices: cpu, tpu, cuda (where cuDNN's kernel runs), or any other.
        mesh: the devices, or None for one.
    """

    asked: str = "reference"
    platform: str = "cpu"
    mesh: AnyMesh | None = None


REFERENCE = Attention()


def platform_of(device: Any) -> str:
    """``cuda`` for what cuDNN's kernel runs on, NVIDIA's GPUs since Ampere; others as jax calls them."""
    if device.platform == "gpu" and "cuda" in device.client.platform_version and float(device.compute_capability) >= 8:
        return "cuda"
    return str(device.platform)


def choose_attention(
    how: Attention,
    dtype: Any,
    rows: int,
    length: int,
    heads: int,
    head_dim: int,
    packed: bool = False,
    capped: bool = False,
) -> tuple[str, str]:
    """The form of one pass.

    Args:
        how: what is asked for, and where.
        dtype: dtype of compute.
        rows: B, over all devices.
        length: T, tokens of a row.
        heads: number of heads of the queries.
        head_dim: width of one.
        packed: whether a row holds several segments.
        capped: whether the model caps its scores.

    Returns:
        One of `FORMS` besides auto; and why it is the reference where ``auto`` took that, else nothing.

    Raises:
        UserError: a form asked for by name that does not go here.
    """
    if how.asked == "reference":
        return "reference", ""
    form = how.asked
    if form == "auto":
        form = next((kernel for kernel, platform in _PLATFORMS.items() if platform == how.platform), "reference")
    if form == "reference":
        return form, f"there is no kernel for {how.platform}"
    against = _against(form, how, np.dtype(dtype).name, rows, heads, head_dim, packed, capped)
    if how.asked != "auto":
        if against:
            raise UserError(f"--attention={form}: {against}; use --attention=auto, which then takes the reference form")
        return form, ""
    if not against and length < _SHORTEST[form]:
        against = f"rows are shorter than {_SHORTEST[form]} tokens"
    return ("reference", against) if against else (form, "")


def _against(
    form: str, how: Attention, dtype: str, rows: int, heads: int, head_dim: int, packed: bool, capped: bool
) -> str:
    """What keeps a kernel from being used, or nothing."""
    if how.platform != _PLATFORMS[form]:
        return f"the kernel is for {_PLATFORMS[form]}, got {how.platform}"
    if form in _DTYPES and dtype not in _DTYPES[form]:
        return f"the kernel computes in {' or '.join(_DTYPES[form])}, got {dtype}"
    if form in _WIDEST_HEAD and (head_dim % 8 or head_dim > _WIDEST_HEAD[form]):
        return f"expected heads of a multiple of 8, at most {_WIDEST_HEAD[form]}, got {head_dim}"
    if packed and form == "cudnn":
        return "the kernel knows no packed rows"
    if capped and form == "cudnn":
        return "the kernel knows no soft cap on scores"
    if how.mesh is not None:
        over, tensor = how.mesh.shape["data"] * how.mesh.shape["fsdp"], how.mesh.shape["tensor"]
        if rows % over or heads % tensor:
            return f"{rows} rows and {heads} heads do not divide over data*fsdp={over} and tensor={tensor}"
    return ""


def attend(
    form: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    windows: Sequence[int | None] = (None,),
    window: jax.Array | None = None,
    segments: jax.Array | None = None,
    mesh: AnyMesh | None = None,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Causal attention by another form than the reference.

    Args:
        form: ``blocks``, ``cudnn`` or ``splash``, as of `choose_attention`.
        q: ``[B, T, H, head_dim]``.
        k: ``[B, T, K, head_dim]``.
        v: ``[B, T, K, head_dim]``.
        windows: all that ``window`` may be: kernels take it as a constant, so each is compiled, and one of them run.
        window: scalar, how many tokens back attention sees; None sees all.
        segments: ``[B, T]`` int32, or None; tokens see only their own segment.
        mesh: splits rows and heads.
        scale: factor on the scores; default 1 / sqrt(head_dim).
        cap: c of the soft cap c tanh(score / c), or None.

    Returns:
        ``[B, T, H, head_dim]``.
    """
    length = q.shape[1]
    kinds = [length] if window is None else sorted({min(size or length, length) for size in windows})
    kernels = [functools.partial(_split, form, mesh, size if size < length else None, scale, cap) for size in kinds]
    if len(kernels) == 1 or window is None:
        return kernels[0](q, k, v, segments)
    which = jnp.searchsorted(jnp.asarray(kinds), jnp.minimum(window, length))
    return jax.lax.switch(which, kernels, q, k, v, segments)


def attend_by_scores(
    q: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array, scale: float | None, cap: float | None
) -> jax.Array:
    """The reference form.

    Scores are ``[B, K, T, H / K, S]``, in the order in which products give and take them: none is transposed.

    Args:
        q: ``[B, T, H, head_dim]``.
        keys: ``[B, K, S, head_dim]``, heads first as a `LayerCache` has them.
        values: likewise.
        visible: ``[B or 1, T, S]`` bool.
        scale: see `attend`.
        cap: see `attend`.

    Returns:
        ``[B, T, H, head_dim]``.
    """
    rows, length, heads, head_dim = q.shape
    grouped = q.reshape(rows, length, keys.shape[1], -1, head_dim).swapaxes(1, 2)
    scores = jnp.einsum("bktgd,bksd->bktgs", grouped, keys.astype(q.dtype), preferred_element_type=jnp.float32)
    scores *= scale or head_dim**-0.5
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    scores = jnp.where(visible[:, None, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    mixed = jnp.einsum("bktgs,bksd->bktgd", weights, values.astype(q.dtype))
    return mixed.swapaxes(1, 2).reshape(rows, length, heads, head_dim)


def _split(
    form: str,
    mesh: AnyMesh | None,
    window: int | None,
    scale: float | None,
    cap: float | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Any,
) -> jax.Array:
    """Each device's rows and heads."""
    forms: dict[str, Callable[..., jax.Array]] = {"cudnn": _cudnn, "splash": _splash, "blocks": _blocks}
    kernel = functools.partial(forms[form], window, scale, cap)
    if mesh is None or mesh.size == 1:
        return kernel(q, k, v, segments)
    if k.shape[2] % mesh.shape["tensor"]:  # fewer key heads than devices: to each query head its own
        k, v = (jnp.repeat(part, q.shape[2] // k.shape[2], axis=2) for part in (k, v))
    rows = RULES["batch"]
    whole = PartitionSpec(rows, None, "tensor", None)
    places = (whole, whole, whole, PartitionSpec(rows, None))
    return jax.shard_map(kernel, mesh=mesh, in_specs=places, out_specs=whole, check_vma=False)(q, k, v, segments)


def _blocks(
    window: int | None,
    scale: float | None,
    cap: float | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
) -> jax.Array:
    length = q.shape[1]
    size = max(_BLOCKS[0], min(_BLOCKS[1], length // 8 // _BLOCKS[0] * _BLOCKS[0]))
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    at = jnp.arange(length)
    mixed = []
    for first in range(0, length, size):
        mine = slice(first, first + size)
        seen = slice(0 if window is None else max(0, first - window + 1), min(first + size, length))
        distance = at[mine, None] - at[seen]
        visible = (distance >= 0 if window is None else (distance >= 0) & (distance < window))[None]
        if segments is not None:
            visible &= segments[:, mine, None] == segments[:, None, seen]
        mixed.append(attend_by_scores(q[:, mine], keys[:, :, seen], values[:, :, seen], visible, scale, cap))
    return jnp.concatenate(mixed, axis=1)


def _cudnn(
    window: int | None, scale: float | None, cap: float | None, q: jax.Array, k: jax.Array, v: jax.Array, segments: None
) -> jax.Array:
    back = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=back, scale=scale, implementation="cudnn"
    )


def _splash(
    window: int | None,
    scale: float | None,
    cap: float | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, scale = q.shape[1], scale or q.shape[-1] ** -0.5
    padded = -(-length // _TILES[-1]) * _TILES[-1]
    tile = next(size for size in _TILES if padded % size == 0)
    fields = dataclasses.fields(splash.BlockSizes)
    tiles: Any = {field.name: tile for field in fields if field.name.startswith("block_")}
    shape = (padded, padded)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * q.shape[2]),
            block_sizes=splash.BlockSizes(**tiles),
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=cap,
        )

    def heads_first(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2)

    # The kernel does not scale; a scale rounded to bfloat16 would be another temperature.
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    q, k, v = heads_first(q), heads_first(k), heads_first(v)
    ids = None
    if segments is not None:
        segments = jnp.pad(segments, ((0, 0), (0, padded - length)), mode="edge")
        ids = splash.SegmentIds(segments, segments)
    rows = jax.vmap(kernel, in_axes=(0, 0, 0, None if ids is None else 0))
    mixed = rows(q, k, v, ids) if q.dtype == jnp.float32 else _by_default(rows, q, k, v, ids)
    return mixed.swapaxes(1, 2)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_default(kernel: Any, *arguments: Any) -> jax.Array:
    """A kernel without the precision that its surroundings ask of products, in the backward pass either.

    Mosaic refuses ``highest`` for bfloat16, whose products are exact in the float32 they are summed in anyway.
    """
    with jax.default_matmul_precision("default"):
        return kernel(*arguments)


def _forward(kernel: Any, *arguments: Any) -> Any:
    with jax.default_matmul_precision("default"):
        return jax.vjp(kernel, *arguments)


def _backward(kernel: Any, turned: Any, cotangent: jax.Array) -> Any:
    with jax.default_matmul_precision("default"):
        return turned(cotangent)


_by_default.defvjp(_forward, _backward)
