"""One mesh of three axes for every run, and the rules that place a tensor's named axes on it.

``data`` splits samples; ``fsdp`` splits samples and the weights, by width or, of a mixture, by experts; ``tensor``
splits heads, the inner width of the MLP and the vocabulary.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcrit.core import processes
from jaxcrit.core.errors import UserError, did_you_mean

AXES = ("data", "fsdp", "tensor")
_ALSO = {"dp": "data", "tp": "tensor", "mp": "tensor", "ep": "fsdp"}
_NOT = {
    "pp": "layers are not parted over devices",
    "sp": "tokens of a row are not parted",
    "cp": "tokens of a row are not parted",
}
AnyMesh = Mesh | AbstractMesh  # of devices, or of their number alone

# Logical axis of a tensor -> mesh axis (or axes) it is split over; None is never split.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "ff": "tensor",
    "rank": None,
    "experts": "fsdp",
}
# Key and value heads are few and small: where they do not divide, each device keeps all of them. Experts are split by
# their width then, as dense weights are.
_REPLICATED_IF_UNEVEN = ("kv_heads", "experts")


def batch_rows(asked: int, mesh: AnyMesh) -> int:
    """Rows of a batch: as many as asked for, rounded up to what divides over the mesh."""
    parts = row_parts(mesh)
    return -(-asked // parts) * parts


def row_parts(mesh: AnyMesh) -> int:
    """How many parts the rows of a batch are split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def parse_mesh(text: str | None) -> dict[str, int]:
    """Reads ``data=4,fsdp=2``: axes and their sizes, of which one may be -1 (what is left).

    ``dp`` and ``tp`` are read as ``data`` and ``tensor``.

    Raises:
        UserError: not of that form, an unknown or repeated axis, or two sizes left open.
    """
    sizes: dict[str, int] = {}
    for part in text.split(",") if text and text.strip() else []:
        axis, _, size = (piece.strip() for piece in part.partition("="))
        if not size.removeprefix("-").isdecimal():
            raise UserError(f"--mesh={text}: expected AXIS=SIZE such as data=4,fsdp=2, got {part.strip()!r}")
        axis = _ALSO.get(axis.lower(), axis)
        if axis.lower() in _NOT:
            raise UserError(
                f"--mesh={text}: {axis}: {_NOT[axis.lower()]}; weights are by fsdp and tensor (tp), rows by data (dp)"
            )
        if axis in sizes:
            raise UserError(f"--mesh={text}: expected each axis once, got {axis} twice")
        sizes[axis] = int(size)
    _check(sizes)
    return sizes


def mesh_sizes(axes: Mapping[str, int] | None, devices: int) -> dict[str, int]:
    """Size of every axis of a mesh of so many devices; arguments and errors as of `make_mesh`."""
    _check(axes or {})
    sizes = {axis: 1 for axis in AXES} | (dict(axes) if axes else {"data": -1})
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if -1 in sizes.values():
        sizes = {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        named = ",".join(f"{axis}={size}" for axis, size in (axes or {}).items())
        raise UserError(
            f"--mesh={named}: expected sizes whose product is {devices}, the number of devices, got {fixed};"
            " leave one open with -1 (such as data=-1) to fill it up"
        )
    return sizes


def make_mesh(axes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh; axes not named have size 1, and without any all devices are on ``data``.

    Args:
        axes: sizes by axis, at most one -1.
        devices: what to use, all of it; default every device of the process group.

    Raises:
        UserError: a wrong axis or size, or sizes whose product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(axes, len(devices))
    # jax's default is explicit axes, under which indexing an embedding needs its output's sharding spelled out.
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def abstract_mesh(axes: Mapping[str, int] | None, devices: int) -> AbstractMesh:
    """The mesh of `make_mesh` without devices: for shapes and shardings."""
    sizes = mesh_sizes(axes, devices)
    return AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec_for(axes: Sequence[str | None], shape: Sequence[int], mesh: AnyMesh, name: str) -> PartitionSpec:
    """Places a tensor by the names of its axes.

    Args:
        axes: logical axis of each dimension (a key of `RULES`), or None.
        shape: sizes of the dimensions; of one made of heads, their number.
        mesh: from `make_mesh`.
        name: the tensor's, for errors.

    Raises:
        UserError: a dimension does not divide over its mesh axis; key and value heads are then replicated instead.
        ValueError: unknown logical axis, a rank that does not match, or one mesh axis for two dimensions.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{name}: expected an axis for each dimension of {tuple(shape)}, got {tuple(axes)}")
    entries: list[str | tuple[str, ...] | None] = []
    used: list[str] = []
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in RULES:
            raise ValueError(f"{name}: expected a logical axis of {', '.join(RULES)}, got {axis!r}")
        entry = None if axis is None else RULES[axis]
        over = (entry,) if isinstance(entry, str) else entry or ()
        parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in over)
        if size % parts and axis in _REPLICATED_IF_UNEVEN:
            entry, over = None, ()
        elif size % parts:
            raise UserError(
                f"{name}: {axis} of size {size} does not divide over {'*'.join(over)}={parts} of the mesh;"
                f" choose --mesh with {' and '.join(over)} of a size that divides {size}"
            )
        if "experts" in axes and set(over) & set(used):  # split already, between experts
            entry, over = None, ()
        if clash := set(over) & set(used):
            raise ValueError(f"{name}: {tuple(axes)} puts two dimensions on mesh axis {', '.join(sorted(clash))}")
        used.extend(over)
        entries.append(entry)
    return PartitionSpec(*entries)


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Samples over ``data`` and ``fsdp``, whatever follows replicated; the batch size must divide over both."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def default_axes(weight_bytes: float, width: int, devices: int, memory: float) -> dict[str, int]:
    """The mesh where none is asked for: rows over all devices, the weights over as few as hold them.

    Copies of the weights cost no traffic, so they are split only where a device cannot hold them whole; over ``fsdp``,
    which splits rows too and asks nothing of the number of heads.

    Args:
        weight_bytes: bytes of the weights of the whole model.
        width: D, which is split.
        devices: their number.
        memory: bytes of one device that weights may take.
    """
    parts = [n for n in range(1, devices + 1) if devices % n == 0 and width % n == 0]
    fitting = [n for n in parts if weight_bytes / n <= memory]
    return {"data": -1, "fsdp": min(fitting, default=parts[-1])}


def device_memory(devices: Sequence[jax.Device]) -> float:
    """Bytes per device that the weights, or a sweep, may take: half of what there is, the rest is for the other.

    Args:
        devices: devices of this process; the answer is that of process 0, in all of them.
    """

    def half() -> float:
        stats = devices[0].memory_stats() if devices[0].platform != "cpu" else None
        if stats and "bytes_limit" in stats:
            return stats["bytes_limit"] / 2
        # Devices of the CPU share its memory.
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 / len(devices)

    return float(processes.share(half))


def _check(sizes: Mapping[str, int]) -> None:
    text = ",".join(f"{axis}={size}" for axis, size in sizes.items())
    for axis, size in sizes.items():
        if axis not in AXES:
            raise UserError(f"--mesh={text}: expected axes {', '.join(AXES)}, got {axis!r}{did_you_mean(axis, AXES)}")
        if size < 1 and size != -1:
            raise UserError(f"--mesh={text}: expected sizes of 1 or more, or -1 for what is left, got {axis}={size}")
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"--mesh={text}: expected at most one size of -1, got {list(sizes.values()).count(-1)}")
