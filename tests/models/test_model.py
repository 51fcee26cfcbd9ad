"""A model as an object: weights are read once, overlays leave what is below them as it is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny_model import tiny_checkpoint

from jaxcrit.models.lora import make_lora
from jaxcrit.models.model import open_model
from jaxcrit.models.overlays import Overlay
from jaxcrit.models.partition import TRAIN, partition
from jaxcrit.parallel.mesh import make_mesh

DEPTH = 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=DEPTH)


@pytest.fixture
def model(checkpoint):
    return open_model(checkpoint, mesh=make_mesh(None, jax.devices()[:1]))


def copies(weights):
    return {path: np.asarray(value).copy() for path, value in weights.items()}


def assert_same(weights, expected):
    assert weights.keys() == expected.keys()
    for path, value in weights.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(expected[path]), err_msg=path)


def blocks_moved(model, layers, by=1.0):
    """Whole layers, every weight larger by as much."""
    weights = copies(model.decoder().weights())
    moved = {path: jnp.asarray(value[layers] + by) for path, value in weights.items() if path.startswith("blocks.")}
    return Overlay(partition(model.config, layers), {TRAIN: moved}, None, 0)


def norm_moved(model):
    """The final norm, larger by 1."""
    return Overlay(partition(model.config, [], ["norm"]), {TRAIN: {"norm": model.decoder().norm + 1}}, None, 0)


def adapted(model, layers):
    """Adapters on the queries of layers."""
    lora = make_lora(model.config, 2, 0.0, ["q"])
    parts = partition(model.config, layers, lora=lora)
    entries = {path: jnp.ones_like(value) for path, value in lora.initial(model.config, layers, 0).items()}
    return Overlay(parts, {TRAIN: entries}, None, 0)


@pytest.mark.parametrize(
    "first", [norm_moved, lambda model: adapted(model, [1]), lambda model: blocks_moved(model, [3])]
)
def test_overlays_on_overlays_leave_everything_below_as_it_was(model, first):
    """The second changes arrays that the first left alone, and so are the base's own."""
    base = copies(model.decoder().weights())
    lower = model.with_overlay(first(model))
    below = copies(lower.decoder().weights())
    upper = lower.with_overlay(blocks_moved(lower, [1, 2]))
    for path, value in upper.decoder().weights().items():
        expected = below[path].copy()
        if path.startswith("blocks."):
            expected[[1, 2]] = below[path][[1, 2]] + np.float32(1)
        np.testing.assert_array_equal(np.asarray(value), expected)
    assert_same(lower.decoder().weights(), below)
    assert_same(model.decoder().weights(), base)
    assert_same(open_model(model.checkpoint.path, mesh=model.mesh).decoder().weights(), base)
