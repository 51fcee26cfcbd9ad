"""Taps of criteria on states that were made up."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrit.criteria.registry import criterion
from jaxcrit.evidence.criterion import Own
from jaxcrit.evidence.forward import View, as_reading


def tapped(key: str, hidden: np.ndarray, own: Own | None = None) -> Any:
    """What a criterion's tap gives of states ``[L+1, N, D]`` of prompts of one token, ``[N, L, ...]``."""
    samples = hidden.shape[1]
    view = View(jnp.ones(samples, jnp.int32), jnp.ones((samples, 1), bool), jnp.arange(samples)[:, None])
    reading = as_reading(criterion(key).tapped(own or {}))
    pairs = list(itertools.pairwise(hidden))
    if reading.embedding:
        pairs.insert(0, (hidden[0], hidden[0]))
    found = [reading.read(jnp.asarray(a)[:, None], jnp.asarray(b)[:, None], view) for a, b in pairs]
    return jax.tree.map(lambda *each: np.stack(each, axis=1), *found)


def measured(key: str, hidden: np.ndarray, own: Own | None = None) -> Any:
    """The criterion's result on such states, with its own options by their class."""
    return criterion(key).measured(tapped(key, hidden, own), own or {})
