"""What goes from one choice of layers to the next: values, moments, counts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.tiny_training import CONFIG

from jaxcrit.models.partition import TRAIN, carried, joined, partition
from jaxcrit.training.optimizer import OPTIMIZERS, make_optimizer, make_schedule
from jaxcrit.training.segments import Changed, carried_moments, selections

OLD, NEW = partition(CONFIG, (1, 3, 4), ("norm",)), partition(CONFIG, (2, 3, 4, 6), ("norm",))


def params_of(parts, number):
    """``number`` plus the layer in every stacked value."""
    layers = jnp.asarray(parts.layers, jnp.float32)
    return {
        TRAIN: {
            "norm": jnp.full((16,), number, jnp.float32),
            "blocks.q": jnp.ones((len(layers), 16, 16)) * (number + layers)[:, None, None],
            "blocks.mlp_norm": jnp.ones((len(layers), 16)) * (number + layers)[:, None],
        }
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_stay_with_the_layers_that_stay(name):
    made = [make_optimizer(name, make_schedule("cosine", 1e-2, 9), parts, clip=1.0) for parts in (OLD, NEW)]
    before, fresh = (one.init(params_of(parts, 0)) for one, parts in zip(made, (OLD, NEW), strict=True))
    for step in (1, 2):
        _, before = made[0].update(params_of(OLD, 10 * step), before, params_of(OLD, 0))
    found = carried_moments(before, OLD, fresh, NEW)
    assert jax.tree.structure(found) == jax.tree.structure(fresh)
    states = [jax.tree_util.tree_leaves_with_path(tree) for tree in (found, before, fresh)]
    stacked = 0
    for (keys, now), (_, then), (_, first) in zip(*states, strict=True):
        path = str(getattr(keys[-1], "key", ""))
        if path.startswith("blocks.") and now.shape[:1] == (4,):
            np.testing.assert_array_equal(now[1:3], then[1:3])
            np.testing.assert_array_equal(now[jnp.asarray([0, 3])], first[jnp.asarray([0, 3])])
            stacked += 1
        else:
            np.testing.assert_array_equal(now, then)
    assert stacked == {"adamw": 4, "lion": 2, "adafactor": 2, "sgd": 0}[name]
    updates, _ = made[1].update(params_of(NEW, 30), found, params_of(NEW, 0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates)) and optax.tree.norm(updates) > 0


def test_all_that_was_trained_keeps_its_newest_values():
    first = Changed(OLD, params_of(OLD, 0))
    both = first.further(NEW, params_of(NEW, 100))
    assert both.parts == joined([OLD, NEW]) and both.parts.layers == (1, 2, 3, 4, 6)
    assert both.params[TRAIN]["blocks.q"][:, 0, 0].tolist() == [1, 102, 103, 104, 106]
    assert both.params[TRAIN]["norm"][0] == 100
    again = both.within(OLD, params_of(OLD, 7))[TRAIN]
    assert again["blocks.mlp_norm"][:, 0].tolist() == [1, 103, 104] and again["norm"][0] == 100
    assert both.further(OLD, params_of(OLD, 0)).params[TRAIN]["blocks.q"][:, 0, 0].tolist() == [1, 102, 3, 4, 106]
    alone = partition(CONFIG, (5,), ("norm",))
    kept = carried(params_of(alone, 0)[TRAIN], alone, params_of(OLD, 3)[TRAIN], OLD)
    assert kept["blocks.q"][:, 0, 0].tolist() == [4, 6, 7] and kept["norm"][0] == 0


def test_choices_as_files_have_them():
    told = [{"step": 0, "layers": [1, 3, 4]}, {"step": 40, "layers": [2, 3, 4, 6]}]
    assert selections([OLD, NEW], 40) == told
