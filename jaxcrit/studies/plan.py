"""What a training step will need on machines that are not here: compiled ahead of time for a TPU topology."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcrit.core.errors import UserError
from jaxcrit.core.layers import LayerSpec, resolve
from jaxcrit.models.checkpoint import DTYPES
from jaxcrit.models.config import ModelConfig
from jaxcrit.parallel.mesh import make_mesh, parse_mesh
from jaxcrit.training.optimizer import make_optimizer, make_schedule
from jaxcrit.training.partition import OUTSIDE, partition, split
from jaxcrit.training.step import TokenBatch, abstract_state, batch_sharding, make_step, state_shardings


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """What ``jaxcrit plan`` is asked.

    Attributes:
        model: directory with a ``config.json``; weights are not needed.
        topology: such as ``v5e:4x4``.
        mesh: devices by axis; empty splits the weights over all of them.
        layers, mode, optimizer, dtype, remat: as of `FinetuneConfig`; layers by number or rule, not by score.
        batch_size: rows of a step, over all devices.
        length: tokens of a row.
    """

    model: str
    topology: str = "v5e:4x4"
    mesh: str = "fsdp=-1"
    layers: str = "all"
    mode: str = "only"
    optimizer: str = "adamw"
    dtype: str = "bfloat16"
    remat: bool = True
    batch_size: int = 32
    length: int = 1024


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory of one step, in bytes per device.

    Attributes:
        devices: how many.
        arguments: weights, optimizer state, batch.
        temporaries: what the step needs besides.
        peak: at the worst moment.
        trained: parameters that train.
        compile_seconds: how long compiling took here.
    """

    devices: int
    arguments: int
    temporaries: int
    peak: int
    trained: int
    compile_seconds: float

    def __str__(self) -> str:
        parts = (("arguments", self.arguments), ("temporaries", self.temporaries), ("peak", self.peak))
        sizes = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts)
        return f"{self.devices} devices, GiB each: {sizes}; {self.trained:,} parameters train"


def run_plan(config: PlanConfig) -> Plan:
    """Compiles the step and reads off its memory.

    Raises:
        UserError: libtpu is absent, the topology is unknown, the step does not fit, or a mistake in the flags.
    """
    model = _config(config.model)
    mesh = _mesh(config)
    spec = LayerSpec.parse(config.layers)
    if spec.needs_scores:
        raise UserError(f"--layers={config.layers}: planning looks at no data; name layers, or first:K, random:K, all")
    chosen = resolve(spec, model.num_layers)
    layers = chosen.layers if config.mode == "only" else chosen.complement()
    everything = config.mode == "freeze" or len(layers) == model.num_layers
    parts = partition(model, layers, set(OUTSIDE) if everything else ())
    params, frozen = split(parts.abstract(mesh, DTYPES[config.dtype]))
    optimizer = make_optimizer(config.optimizer, make_schedule("constant", 1e-5, 1), parts)
    state = abstract_state(parts, optimizer, params)
    shardings = state_shardings(state, mesh)
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, shardings
    )
    step = make_step(parts, optimizer, dtype=DTYPES[config.dtype], remat=config.remat, mesh=mesh, shardings=shardings)
    began = time.perf_counter()
    try:
        memory: Any = step.lower(state, frozen, _batch(config, mesh)).compile().memory_analysis()  # type: ignore[attr-defined]
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"does not fit {config.topology}: {str(error).splitlines()[0][:200]}") from None
    return Plan(
        devices=mesh.size,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        trained=sum(leaf.size for leaf in jax.tree.leaves(params)),
        compile_seconds=round(time.perf_counter() - began, 1),
    )


def _config(model: str) -> ModelConfig:
    path = Path(model).expanduser() / "config.json"
    try:
        return ModelConfig.from_hf(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError) as error:
        raise error if isinstance(error, UserError) else UserError(f"--model={model}: no config.json there") from None


def _mesh(config: PlanConfig) -> Mesh:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("plan: needs libtpu, which compiles for TPUs without having one; pip install 'jaxcrit[plan]'")
    # libtpu would ask the metadata server of a cloud machine who it is; this says so instead. Its lock file guards a
    # chip, of which there is none, and stays behind: without the last of these a second plan would be refused.
    for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost"),
                        ("TPU_ACCELERATOR_TYPE", "v5litepod-16"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")):  # fmt: skip
        os.environ.setdefault(name, value)
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=config.topology)
    except Exception as error:  # an unknown name is an error of its own in every backend
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(
            f"--topology={config.topology}: expected a name such as v5e:4x4 or v5p:2x2x2 ({reason})"
        ) from None
    return make_mesh(parse_mesh(config.mesh), topology.devices)


def _batch(config: PlanConfig, mesh: Mesh) -> TokenBatch:
    rows = NamedSharding(mesh, PartitionSpec(None, *batch_sharding(mesh).spec))

    def like(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, config.batch_size, *shape), dtype, sharding=rows)

    return TokenBatch(like(jnp.int32, config.length), like(jnp.int32), like(np.bool_, config.length))
