"""What a job will need on machines that are not here: by shapes anywhere, compiled ahead of time for TPU slices."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies

from jaxcrit.core.errors import UserError, did_you_mean
from jaxcrit.models.attention import ASKED, Attention, choose_attention
from jaxcrit.models.checkpoint import DTYPES
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.shapes import config_of
from jaxcrit.parallel.accounting import collectives, product_flops, shard_bytes
from jaxcrit.parallel.chips import USABLE, Topology
from jaxcrit.parallel.mesh import AXES, AnyMesh, abstract_mesh, make_mesh, mesh_sizes, parse_mesh
from jaxcrit.studies.options import PlanOptions
from jaxcrit.studies.plan_jobs import JOBS, Program, program_of


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one device; bytes.

    Attributes:
        arguments, temporaries: bytes in the unit that needs most.
        peak: at the worst moment, with what other units keep meanwhile.
        needed: where it does not fit, what it would take; else 0.
        collectives: kind -> (runs, bytes), of a batch.
        seconds: how long compiling took here.
    """

    arguments: int
    temporaries: int
    peak: int
    needed: int
    collectives: dict[str, tuple[int, int]]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """A job on a topology; bytes and operations of one device, for one batch.

    Attributes:
        config: what was asked, with the mesh and batch size that a search found.
        topology: parsed.
        mesh: size by axis.
        memory: bytes by kind, from shapes.
        temporaries: estimated from shapes.
        flops: operations of matrix products.
        moved: bytes of HBM moved, at least.
        exchanged: over links: of the compiled program, or estimated from shapes.
        trained: parameters that train, over all devices.
        compiled: None where it was not.
        attention: the form it takes, and why where that is not a kernel.
        notes: what is missing, and why.
    """

    config: PlanOptions
    topology: Topology
    mesh: dict[str, int]
    memory: dict[str, int]
    temporaries: int
    flops: float
    moved: int
    exchanged: int
    trained: int
    compiled: Compiled | None
    attention: tuple[str, str]
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes at the worst moment: the compiler's word where there is one."""
        if self.compiled:
            return self.compiled.needed or self.compiled.peak
        return self.estimated

    @property
    def estimated(self) -> int:
        """The same from shapes alone."""
        return sum(self.memory.values()) + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether a device has room."""
        if self.compiled:
            return not self.compiled.needed
        return self.peak <= USABLE * self.topology.chip.memory

    @property
    def seconds(self) -> dict[str, float]:
        """What each resource needs at its ceiling; the largest bounds the step from below."""
        chip = self.topology.chip
        return {
            "compute": self.flops / chip.flops,
            "memory": self.moved / chip.bandwidth,
            "links": self.exchanged / chip.links if self.topology.devices > 1 else 0.0,
        }


def run_plan(config: PlanOptions) -> Plan:
    """Plans a job.

    Raises:
        UserError: an unknown topology, shape or job, a mesh that does not divide, or a mistake in the flags.
    """
    if config.job not in JOBS:
        raise UserError(f"--job={config.job}: expected {', '.join(JOBS)}{did_you_mean(config.job, JOBS)}")
    topology, model = Topology.parse(config.topology, config.memory), config_of(config.model)
    config = dataclasses.replace(config, topology=topology.name)
    _flops(_anywhere(config), model)  # mistakes in the flags of the job, whatever the mesh
    if config.search:
        return _search(config, topology, model)
    return _compile(_by_shapes(config, topology, model), model)


def fitting(plan: Plan) -> PlanOptions | None:
    """The fastest way to run the job that fits by shapes, or None; shapes count for more where the compiler said so."""
    plans = _fitting(plan.config, plan.topology, config_of(plan.config.model), plan.peak / plan.estimated)
    return plans[0].config if plans else None


def _search(config: PlanOptions, topology: Topology, model: ModelConfig) -> Plan:
    """Compiles what fits by shapes, fastest first, until one fits."""
    plans = _fitting(config, topology, model)
    for plan in plans[:4]:
        compiled = _compile(plan, model)
        if compiled.fits:
            return compiled
    if not plans:
        raise UserError(f"{_short_of(config, topology, model)}; {advice(config)}")
    return compiled


def missing(plan: Plan) -> str:
    """What the topology lacks for a job, where nothing would fit on it."""
    return _short_of(plan.config, plan.topology, config_of(plan.config.model))


def _short_of(config: PlanOptions, topology: Topology, model: ModelConfig) -> str:
    """How far the leanest way to part the devices is from fitting."""
    plans = list(_candidates(config, topology, model))
    has = f"{USABLE * topology.chip.memory / 2**30:.2f} GiB that one has"
    if not plans:
        return f"nothing fits {topology.name}: no mesh of {topology.devices} devices divides this model"
    least = min(plans, key=lambda plan: plan.estimated)
    return (
        f"nothing fits {topology.name}: at the least a device needs {least.estimated / 2**30:.2f} GiB"
        f" (--mesh={least.config.mesh} --batch_size={least.config.batch_size}) of the {has}"
    )


def advice(config: PlanOptions) -> str:
    """What would make a job smaller."""
    more = "take more chips, or chips with more memory"
    if config.job == "finetune":
        return f"{more}; or fewer --layers, a --lora_rank, --optimizer=adafactor or a shorter --length"
    return f"{more}; or a shorter --length"


def _fitting(config: PlanOptions, topology: Topology, model: ModelConfig, factor: float = 1.0) -> list[Plan]:
    """Those of `_candidates` that fit if they take so many times what shapes say, fastest per row first."""
    room = USABLE * topology.chip.memory / max(1.0, factor)
    plans = [plan for plan in _candidates(config, topology, model) if plan.estimated <= room]
    return sorted(plans, key=lambda plan: max(plan.seconds.values()) / plan.config.batch_size)


def _candidates(config: PlanOptions, topology: Topology, model: ModelConfig) -> Iterator[Plan]:
    """Every way to part the devices that the model's shape allows, with the batch asked for and its halves."""
    devices = topology.devices
    for tensor in _divisors(devices):
        for fsdp in _divisors(devices // tensor):
            rows = devices // tensor
            mesh = ",".join(f"{axis}={size}" for axis, size in zip(AXES, (rows // fsdp, fsdp, tensor), strict=True))
            batches = {max(rows, config.batch_size // 2**halved // rows * rows) for halved in range(6)}
            for batch in sorted(batches, reverse=True):
                try:
                    asked = dataclasses.replace(config, mesh=mesh, batch_size=batch, search=False)
                    yield _by_shapes(asked, topology, model)
                except UserError:  # an axis does not divide
                    break


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _sizes(config: PlanOptions, devices: int) -> dict[str, int]:
    return mesh_sizes(parse_mesh(config.mesh or "fsdp=-1"), devices)


def _by_shapes(config: PlanOptions, topology: Topology, model: ModelConfig) -> Plan:
    sizes = _sizes(config, topology.devices)
    if config.batch_size % (sizes["data"] * sizes["fsdp"]):
        raise UserError(
            f"--batch_size={config.batch_size}: does not divide over data*fsdp={sizes['data'] * sizes['fsdp']}"
        )
    mesh = abstract_mesh(sizes, topology.devices)
    placed = _placed(model, config, topology, mesh)
    program = program_of(placed, config, mesh)
    shape = config.batch_size, config.length, model.num_heads, model.head_dim
    capped = model.attention_cap is not None
    form = choose_attention(placed.attention, DTYPES[config.dtype], *shape, capped=capped)
    moved, exchanged = _traffic(program, config, sizes, model)
    return Plan(
        config=config,
        topology=topology,
        mesh=sizes,
        memory={kind: shard_bytes(tree) for kind, tree in program.kinds.items()},
        temporaries=program.temporaries,
        flops=_flops(_anywhere(config), model) / topology.devices,
        moved=moved,
        exchanged=exchanged,
        trained=sum(leaf.size for leaf in jax.tree.leaves(program.trained)),
        compiled=None,
        attention=form,
    )


def _placed(model: ModelConfig, config: PlanOptions, topology: Topology, mesh: AnyMesh) -> ModelConfig:
    """The model with attention as it would be computed there."""
    how = Attention(ASKED.get(), "tpu" if topology.chip.slices else "cuda", mesh)
    return dataclasses.replace(model, attention=how)


def _anywhere(config: PlanOptions) -> PlanOptions:
    """The job alone, for what is the same on every topology and mesh."""
    return dataclasses.replace(config, model="", topology="", mesh="", search=False, compile=False)


@functools.lru_cache
def _flops(config: PlanOptions, model: ModelConfig) -> int:
    """Of all devices, in the reference form; the mesh changes nothing, and tracing takes a third of a second."""
    model = dataclasses.replace(model, attention=Attention("reference", "tpu"))  # experts as on any accelerator
    units = program_of(model, config, abstract_mesh(None, 1)).units
    return sum(unit.runs * product_flops(unit.function, *unit.arguments, turns=unit.turns) for unit in units)


def _traffic(program: Program, config: PlanOptions, sizes: dict[str, int], model: ModelConfig) -> tuple[int, int]:
    """Bytes through one device's memory and over its links: weights, gathered over fsdp, and what is summed besides.

    Summed are activations over tensor, twice a layer, and gradients over all that split the rows.
    """
    size = 2 if config.dtype == "bfloat16" else 4
    fsdp, tensor, rows = sizes["fsdp"], sizes["tensor"], sizes["data"] * sizes["fsdp"]
    read = program.passes * program.weights
    summed = 4 * model.num_layers * size * program.tokens * model.width * (tensor - 1) / tensor
    reduced = 2 * shard_bytes(program.trained) * (rows - 1) / rows
    return int(read * fsdp + program.moved), int(read * (fsdp - 1) + summed + reduced)


def _compile(plan: Plan, model: ModelConfig) -> Plan:
    """The plan with the compiler's numbers, or with a note that says why there are none."""
    config, chip = plan.config, plan.topology.chip
    if not chip.slices:
        return dataclasses.replace(plan, notes=("no compiler for GPUs that are not here: from shapes alone",))
    if not config.compile:
        return dataclasses.replace(plan, notes=("not compiled, as asked: from shapes alone",))
    if importlib.util.find_spec("libtpu") is None:
        note = "libtpu is missing, which compiles for TPUs without having one: from shapes alone (pip install"
        return dataclasses.replace(plan, notes=(f"{note} 'jaxcrit[plan]')",))
    mesh = make_mesh(plan.mesh, tpus(config.topology))
    program = program_of(_placed(model, config, plan.topology, mesh), config, mesh)
    began = time.perf_counter()
    kept, worst = sum(plan.memory.values()), Compiled(0, 0, 0, 0, {}, 0.0)
    found: dict[str, tuple[int, int]] = {}
    for unit in program.units:
        beside = max(0, kept - shard_bytes((unit.arguments, unit.results)))
        try:
            with jax.default_matmul_precision(unit.precision):
                compiled = unit.function.lower(*unit.arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            needed = needed_bytes(str(error), shard_bytes(unit.arguments), config.topology) + beside
            worst = Compiled(0, 0, needed, needed, {}, 0.0)
            break
        for kind, (runs, size) in collectives(compiled.as_text(), unit.turns).items():
            before = found.get(kind, (0, 0))
            found[kind] = (before[0] + unit.runs * runs, before[1] + unit.runs * size)
        memory = compiled.memory_analysis()
        peak = memory.peak_memory_in_bytes + beside
        if peak > worst.peak:
            needed = peak if beside and peak > USABLE * chip.memory else 0
            worst = Compiled(memory.argument_size_in_bytes, memory.temp_size_in_bytes, peak, needed, {}, 0.0)
    exchanged = plan.exchanged if worst.needed else sum(size for _, size in found.values())
    seconds = round(time.perf_counter() - began, 1)
    return dataclasses.replace(
        plan, exchanged=exchanged, compiled=dataclasses.replace(worst, collectives=found, seconds=seconds)
    )


def needed_bytes(error: str, arguments: int, topology: str) -> int:
    """What a program too large would take, from the compiler's words; some of them leave its arguments out.

    Raises:
        UserError: the words say something else.
    """
    found = re.search(
        r"[Uu]sed ([\d.]+)([GM])|temporaries \(([\d.]+)([GM])|([\d.]+)([GM])(?:iB)?\)? (?:of hbm|exceeds)", error
    )
    if found is None:
        raise UserError(f"does not compile for {topology}: {error.splitlines()[0][:200]}") from None
    number, unit = (part for part in found.groups() if part)
    return int(float(number) * 2 ** {"G": 30, "M": 20}[unit]) + (arguments if found[3] else 0)


def tpus(topology: str) -> list[Any]:
    """Devices of a slice that is not here, to compile for."""
    # libtpu would ask the metadata server of a cloud machine who it is; this says so instead. Its lock file guards a
    # chip, of which there is none, and stays behind: without the last of these a second plan would be refused.
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-16"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        os.environ.setdefault(name, value)
    # A v4's two cores are one device on real machines; a slice of one chip has a host of its own.
    more = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    one = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **more, **one).devices)
    except Exception as error:  # each backend has errors of its own
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(f"--topology={topology}: libtpu knows no such slice ({reason})") from None
