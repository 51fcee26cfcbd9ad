"""Low-rank adapters (Hu et al., arXiv:2106.09685): ``y = W x + alpha / rank B A x``, with W frozen, A and B trained.

A weight ``[out, in]`` gets A ``[rank, in]`` and B ``[out, rank]``. B begins at zero, so the first step starts from the
model itself; A begins uniform within 1 / sqrt(in), as in `peft`.

The products are taken one after the other, never B A as a matrix. By hand, a token then costs 6 rank (in + out)
operations in the forward and backward pass, whatever else is done. With B A added to W first, the gradient of that sum
alone is 2 in out a token, the full cost of training W, and an ``[out, in]`` array: dearer wherever
rank < in out / 3 (in + out), which is 53 at width 320 and 683 at 4,096, square.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrit.core.errors import UserError, did_you_mean, listed
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.weights import Weight, offsets, table

A, B = "_lora_a", "_lora_b"


@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters of one run.

    Attributes:
        rank: rank of each.
        alpha: the product counts alpha / rank times.
        targets: the linear layers of a block that have one, such as ``q`` and ``down``.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank

    def rows(self, config: ModelConfig) -> list[Weight]:
        """The weights that have an adapter."""
        return [row for row in linears(config) if row.path.removeprefix("blocks.") in self.targets]

    def shapes(self, config: ModelConfig, count: int) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        """Logical axes and shape of each adapter array, stacked over ``count`` layers."""
        found: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
        for row in self.rows(config):
            (layers, out, inside), (outs, ins) = row.axes, row.hf_shape(config)
            found[row.path + A] = (layers, "rank", inside), (count, self.rank, ins)
            found[row.path + B] = (layers, out, "rank"), (count, outs, self.rank)
        return found

    def initial(self, config: ModelConfig, layers: Sequence[int], seed: int) -> dict[str, jax.Array]:
        """A and B before the first step, float32; a layer's do not depend on which others have one."""
        shapes = self.shapes(config, len(layers))
        found: dict[str, jax.Array] = {}
        for number, row in enumerate(linears(config)):
            if row.path + A not in shapes:
                continue
            (_, lower), (_, upper) = shapes[row.path + A], shapes[row.path + B]
            bound = 1 / math.sqrt(lower[2])
            key = jax.random.fold_in(jax.random.key(seed), number)
            draws = [
                jax.random.uniform(jax.random.fold_in(key, layer), lower[1:], jnp.float32, -bound, bound)
                for layer in layers
            ]
            found |= {row.path + A: jnp.stack(draws), row.path + B: jnp.zeros(upper, jnp.float32)}
        return found

    def scaled(self, entries: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """What stands beside the weights of a block, by name: A, and B times the scale."""
        return {
            path.removeprefix("blocks."): value * self.scale if path.endswith(B) else value
            for path, value in entries.items()
            if path.endswith((A, B))
        }

    def changes(self, config: ModelConfig, entries: Mapping[str, jax.Array]) -> Iterator[tuple[str, jax.Array]]:
        """By path, what is added to the weights ``[n, ...]``, float32; one after the other."""
        for row in self.rows(config):
            a, b = (entries[row.path + end] for end in (A, B))
            yield row.path, self.scale * jnp.einsum("nor,nri->noi", b, a, precision=jax.lax.Precision.HIGHEST)


def linears(config: ModelConfig) -> list[Weight]:
    """The linear layers of a block that every token goes through; a router and experts are none."""
    return [row for row in table(config) if row.stacked and len(row.groups) == 2 and "experts" not in row.axes]


def make_lora(config: ModelConfig, rank: int, alpha: float = 0.0, targets: Sequence[str] = ()) -> Lora:
    """Checks what is asked against the model.

    Args:
        config: config of the model.
        rank: 1 or more.
        alpha: above 0; 0 for twice the rank.
        targets: some of ``q``, ``k``, ``v``, ``o``, ``gate``, ``up``, ``down``; all of them where none is given.

    Raises:
        UserError: naming the flag.
    """
    known = [row.path.removeprefix("blocks.") for row in linears(config)]
    for target in targets:
        if config.experts and target in ("gate", "up", "down", "router"):
            raise UserError(
                f"--lora_targets={target}: is of the {config.experts} experts of each layer, which have no adapters"
                f" (nor has their router); expected {listed(known)}, or train the experts whole, without --lora_rank"
            )
        if target not in known:
            raise UserError(f"--lora_targets={target}: expected {listed(known, 9)}{did_you_mean(target, known)}")
    if not 0 <= alpha < math.inf:
        raise UserError(f"--lora_alpha={alpha}: expected a number above 0, or 0 for twice the rank")
    lora = Lora(rank, float(alpha or 2 * rank), tuple(name for name in known if not targets or name in targets))
    most = min(min(row.hf_shape(config)) for row in lora.rows(config))
    if not 1 <= rank <= most:
        raise UserError(f"--lora_rank={rank}: expected 1 to {most}, the smallest side of the layers it is for")
    return lora


def peft_tensors(
    config: ModelConfig, lora: Lora, layers: Sequence[int], entries: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """A and B under the names that `peft` gives them, float32.

    Where several of our layers are one tensor of the checkpoint (Phi-3's ``qkv_proj``), their A are put under each
    other and their B on the diagonal of one of that many times the rank: the same function.
    """
    begin, shapes = offsets(config), {row.path: row.hf_shape(config) for row in table(config)}
    tensors: dict[str, np.ndarray] = {}
    for slot, layer in enumerate(layers):
        for hf, rows in _modules(config, lora).items():
            out = sum(shapes[row.path][0] for row in table(config) if row.hf == hf)
            lower = [np.asarray(entries[row.path + A][slot]) for row in rows]
            upper = np.zeros((out, lora.rank * len(rows)), np.float32)
            for number, row in enumerate(rows):
                here = slice(begin[row.path], begin[row.path] + shapes[row.path][0])
                upper[here, number * lora.rank : (number + 1) * lora.rank] = entries[row.path + B][slot]
            name = "base_model.model." + hf.format(layer).removesuffix(".weight")
            tensors |= {f"{name}.lora_A.weight": np.concatenate(lower), f"{name}.lora_B.weight": upper}
    return tensors


def peft_config(config: ModelConfig, lora: Lora, layers: Sequence[int], base: str) -> dict[str, Any]:
    """The content of ``adapter_config.json``."""
    fused = {_module(hf): len(rows) for hf, rows in _modules(config, lora).items()}
    several = {name: count for name, count in fused.items() if count > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "rank_pattern": {name: count * lora.rank for name, count in several.items()},
        "alpha_pattern": {name: count * lora.alpha for name, count in several.items()},
        "target_modules": list(fused),
        "layers_to_transform": list(layers),
        "layers_pattern": "layers",
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _modules(config: ModelConfig, lora: Lora) -> dict[str, list[Weight]]:
    """Our adapted layers by tensor of the checkpoint."""
    found: dict[str, list[Weight]] = {}
    for row in lora.rows(config):
        found.setdefault(row.hf, []).append(row)
    return found


def _module(hf: str) -> str:
    return hf.removesuffix(".weight").rpartition(".")[2]
