"""Second moments of what ``down`` reads, layer by layer, over ordinary text: what an edit must leave as it is.

The products are summed inside the forward pass, so that of each layer one ``[F, F]`` array is kept and no keys.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrit.core import processes
from jaxcrit.core.hashing import sha256_json
from jaxcrit.core.progress import bar
from jaxcrit.core.remembered import recalled, remember
from jaxcrit.core.schema import Array
from jaxcrit.data.batches import make_batches
from jaxcrit.data.templates import Example
from jaxcrit.models.decoder import Context, Decoder, embed, layer_windows, run
from jaxcrit.models.model import Bars, Model
from jaxcrit.models.sites import Site, Tap
from jaxcrit.parallel.mesh import batch_sharding

ENOUGH = 10  # tokens for each direction


@dataclasses.dataclass(frozen=True, eq=False)
class Covariances:
    """What was found.

    Attributes:
        moments: by layer ``[F, F]`` float32, the mean of k k^T, shrunk where there were few tokens.
        tokens: how many keys went in.
        shrunk: weight of the multiple of the identity in the result; 0 where there were enough.
        cached: layers that were read and not computed.
    """

    moments: dict[int, np.ndarray]
    tokens: int
    shrunk: float
    cached: tuple[int, ...]


def covariances(
    model: Model, examples: Sequence[Example], layers: Sequence[int], batch_size: int, bars: Bars | None = None
) -> Covariances:
    """Second moments over all tokens of prompts but each one's first, on which many models keep huge keys.

    With fewer than 10 F tokens the mean is drawn towards the multiple of the identity that has its trace, with weight
    F over the number of tokens. What was computed is kept in jaxcrit's cache directory, by model, rows and layer.

    Args:
        model: model.
        examples: N prompts.
        layers: layers, ascending.
        batch_size: rows per pass.
        bars: maker of progress bars.
    """
    ff = model.config.ff_width
    tokens = sum(example.prompt_length - 1 for example in examples)
    rows = sha256_json([example.token_ids[: example.prompt_length].tolist() for example in examples])
    made_of = {"model": model.model_hash, "dtype": model.dtype, "rows": rows}
    holds = {"moment": Array("f", (ff, ff))}
    kept = {layer: recalled("covariance", {**made_of, "layer": layer}, holds) for layer in layers}
    found = {layer: arrays["moment"] for layer, arrays in kept.items() if arrays is not None}
    cached, missing = tuple(found), [layer for layer in layers if layer not in found]
    if missing:
        for layer, moment in zip(missing, _sums(model, examples, tuple(missing), batch_size, bars), strict=True):
            found[layer] = (moment / tokens).astype(np.float32)
            remember("covariance", {**made_of, "layer": layer}, {"moment": found[layer]})
    shrunk = 0.0 if tokens >= ENOUGH * ff else min(1.0, ff / tokens)
    if shrunk:
        eye = np.eye(ff, dtype=np.float32)
        found = {
            layer: (1 - shrunk) * one + np.float32(shrunk * np.trace(one, dtype=np.float64) / ff) * eye
            for layer, one in found.items()
        }
    return Covariances({layer: found[layer] for layer in layers}, tokens, shrunk, cached)


def _sums(
    model: Model, examples: Sequence[Example], layers: tuple[int, ...], batch_size: int, bars: Bars | None
) -> np.ndarray:
    """``[n, F, F]`` float64 sums of k k^T; added up on the device in float32 over a batch, here over batches."""
    decoder = model.decoder(bars)
    total = np.zeros((len(layers), model.config.ff_width, model.config.ff_width))
    with bar(bars, total=len(examples), desc="covariance", unit=" rows") as shown:
        for batch in make_batches(examples, model.budget(batch_size), max_length=model.config.max_length):
            placed = jax.device_put((batch.tokens, batch.lengths), batch_sharding(model.mesh))
            with jax.default_matmul_precision("highest"):
                for number, moment in enumerate(processes.whole(layer_moments(decoder, *placed, layers=layers))):
                    total[number] += moment
            shown.update(int((batch.rows < len(examples)).sum()))
    return total


@functools.partial(jax.jit, static_argnames="layers")
def layer_moments(
    decoder: Decoder, tokens: jax.Array, lengths: jax.Array, *, layers: tuple[int, ...]
) -> list[jax.Array]:
    """``[F, F]`` of each layer: one scan over each run of layers that are wanted, or that are not."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    context = Context(positions, *decoder.config.rope.cos_sin(positions, lengths))
    real = (positions > 0) & (positions < lengths[:, None])

    def read(site: Site, before: jax.Array, after: jax.Array, positions: jax.Array) -> jax.Array:
        keys = jnp.where(real[..., None], after.astype(jnp.float32), 0).reshape(-1, after.shape[-1])
        return keys.T @ keys

    x, found = embed(decoder, tokens), list[jax.Array]()
    for wanted, group in itertools.groupby(range(max(layers) + 1), key=lambda layer: layer in layers):
        part = list(group)
        tap = Tap(read, ("ff",)) if wanted else None
        windows = layer_windows(decoder.config, part)
        out = run(decoder.blocks, jnp.asarray(part), x, context, windows=windows, tap=tap)
        x = out.hidden
        found += list(out.taps["ff"]) if wanted else []
    return found
