"""A tiny model and batches to train on, all from seeds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrit.models.config import ModelConfig
from jaxcrit.models.partition import partition, split
from jaxcrit.models.weights import table
from jaxcrit.parallel.mesh import make_mesh
from jaxcrit.training.objectives import TokenBatch
from jaxcrit.training.optimizer import make_optimizer, make_schedule
from jaxcrit.training.step import abstract_state, initial_state, make_step, place, state_shardings

RAW = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIG = ModelConfig.from_hf(RAW)


def one_device():
    return make_mesh(None, jax.devices()[:1])


def random_weights(config=CONFIG, seed=0, dtype=np.float32):
    """By weight-table path, normal around 0 (norms around 1)."""
    rng = np.random.default_rng(seed)
    return {
        row.path: (rng.normal(0, 0.2, row.shape(config)) + row.path.endswith("norm")).astype(dtype)
        for row in table(config)
    }


def random_batch(micro=1, rows=8, length=12, seed=1, vocab=64):
    """``[micro, rows, length]`` with prompts and responses of mixed length."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, length + 1, (micro, rows)).astype(np.int32)
    prompts = np.minimum(rng.integers(1, 5, (micro, rows)), lengths - 1)
    at = np.arange(length)
    tokens = np.where(at < lengths[..., None], rng.integers(0, vocab, (micro, rows, length)), 0).astype(np.int32)
    return TokenBatch(tokens, lengths, (at >= prompts[..., None]) & (at < lengths[..., None]))


class Trainer:
    """State, frozen arrays and a compiled step of a partition of the tiny model."""

    def __init__(
        self,
        layers=(2, 4),
        outside=(),
        *,
        config=CONFIG,
        mesh=None,
        dtype=jnp.float32,
        optimizer="adamw",
        factors=None,
        lora=None,
        rate=1e-2,
        weights=None,
        seed=0,
        **options,
    ):
        settings = {key: options.pop(key) for key in ("weight_decay", "clip") if key in options}
        self.mesh = mesh or one_device()
        self.partition = partition(config, layers, outside, factors, lora)
        loaded = {path: jnp.asarray(value) for path, value in (weights or random_weights(config)).items()}
        params, self.frozen = split(self.partition.gather(loaded, self.mesh, dtype, seed))
        schedule = make_schedule("constant", rate, 100)
        self.optimizer = make_optimizer(optimizer, schedule, self.partition, **settings)
        self.state = initial_state(self.partition, self.optimizer, params, self.mesh)
        shardings = state_shardings(abstract_state(self.partition, self.optimizer, params), self.mesh)
        self.step = make_step(
            self.partition, self.optimizer, dtype=dtype, mesh=self.mesh, shardings=shardings, **options
        )

    def run(self, *batches):
        """Takes a step on each batch; returns the metrics of each."""
        metrics = []
        for batch in batches:
            self.state, found = self.step(self.state, self.frozen, place(batch, self.mesh))
            metrics.append(jax.device_get(found))
        return metrics

    def params(self):
        return jax.device_get(self.state.params)
