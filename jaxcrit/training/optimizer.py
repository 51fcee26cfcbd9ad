"""Optimizers: one transformation per group of parameters, clipping and decay inside the trained ones.

A clip or a norm in front of `optax.multi_transform` would read the gradients of frozen parameters too, and so make
XLA compute them: 1,459 MiB and 256 GFLOP against 489 MiB and 133 for five of 32 layers. Here frozen parameters are
not in the gradient at all, and ``set_to_zero`` stands guard should somebody put them there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcrit.core.errors import UserError, did_you_mean, listed
from jaxcrit.models.partition import FROZEN, Partition

SCHEDULES = ("constant", "linear", "cosine")


def _decays(bank: Any) -> Any:
    """By parameter, whether it decays: norms and biases are no matrices, whatever axes they have here."""
    return jax.tree_util.tree_map_with_path(lambda keys, _: not keys[-1].key.endswith(("norm", "_bias")), bank)


def _adamw(rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    return optax.adamw(rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=decay, mask=_decays)


def _lion(rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    return optax.lion(rate, weight_decay=decay, mask=_decays)


def _adafactor(rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    # optax.adafactor would add the decay unscaled by the rate, and scale updates by the size of the parameters.
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(decay, _decays),
        optax.scale_by_learning_rate(rate),
    )


def _sgd(rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(decay, _decays), optax.sgd(rate))


# Bytes of state per float32 parameter: adamw 8, lion 4, adafactor rows plus columns, sgd none.
OPTIMIZERS: dict[str, Callable[[optax.Schedule, float], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lion": _lion,
    "adafactor": _adafactor,
    "sgd": _sgd,
}


def make_schedule(kind: str, peak: float, steps: int, warmup: int = 0) -> optax.Schedule:
    """Learning rate by step.

    Rises linearly over ``warmup`` steps (the first step already moves), then stays (``constant``), falls to zero
    in a line (``linear``) or along half a cosine (``cosine``), reaching zero one step after the last.

    Args:
        kind: one of `SCHEDULES`.
        peak: highest rate, above 0.
        steps: number of steps of the whole run.
        warmup: steps, fewer than ``steps``.

    Raises:
        UserError: unknown kind, a rate that is not above zero, or a warm-up that outlasts the run.
    """
    if kind not in SCHEDULES:
        raise UserError(f"--schedule={kind}: expected {listed(SCHEDULES)}{did_you_mean(kind, SCHEDULES)}")
    if not 0 < peak < float("inf"):
        raise UserError(f"--learning_rate={peak}: expected a number above 0, such as 2e-5")
    if not 0 <= warmup < max(steps, 1):
        raise UserError(f"--warmup={warmup}: expected fewer steps than the run has ({steps}), 0 for none")

    def rate(count: Any) -> jax.Array:
        rise = jnp.minimum(1.0, (count + 1) / max(warmup, 1))
        done = jnp.clip((count - warmup) / (steps - warmup), 0.0, 1.0)
        falls = {"constant": jnp.ones_like(done), "linear": 1 - done, "cosine": (1 + jnp.cos(jnp.pi * done)) / 2}
        return peak * jnp.where(count < warmup, rise, falls[kind])

    return rate


def make_optimizer(
    name: str, schedule: optax.Schedule, partition: Partition, *, weight_decay: float = 0.0, clip: float = 0.0
) -> optax.GradientTransformation:
    """The transformation of a whole bank, or of its trained groups alone.

    Args:
        name: one of `OPTIMIZERS`.
        schedule: learning rate by step; each group's is that times its factor.
        partition: the groups.
        weight_decay: decoupled, times the rate; of matrices, not of norms and biases.
        clip: largest global norm of a group's gradient; 0 for none.

    Raises:
        UserError: unknown optimizer, or a negative decay or clip.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"--optimizer={name}: expected {listed(list(OPTIMIZERS))}{did_you_mean(name, OPTIMIZERS)}")
    for flag, value in (("weight_decay", weight_decay), ("clip", clip)):
        if not 0 <= value < float("inf"):
            raise UserError(f"--{flag}={value}: expected 0 or more")

    def of_group(factor: float) -> optax.GradientTransformation:
        update = OPTIMIZERS[name](lambda count: factor * schedule(count), weight_decay)
        return optax.chain(optax.clip_by_global_norm(clip), update) if clip else update

    transforms = {group: of_group(factor) for group, factor in partition.rates} | {FROZEN: optax.set_to_zero()}
    return optax.multi_transform(transforms, lambda bank: {group: group for group in bank})
