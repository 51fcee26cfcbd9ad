"""Meshes: interim."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

RULES = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "ff": "tensor",
}


def make_mesh(axes=None, devices=None):
    devices = devices or jax.devices()
    axes = axes or {"data": len(devices)}
    shape = tuple(axes.get(a, 1) for a in ("data", "fsdp", "tensor"))
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def parse_mesh(text):
    return {k: int(v) for k, v in (p.split("=") for p in text.split(","))} if text else None


def spec_for(axes, shape, mesh, name):
    return P(*[RULES[a] for a in axes])


def batch_sharding(mesh):
    return NamedSharding(mesh, P(("data", "fsdp")))
