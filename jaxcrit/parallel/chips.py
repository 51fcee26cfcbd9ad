"""What accelerators can do, from their makers' public pages; ceilings, not measurements."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

from jaxcrit.core.errors import UserError, did_you_mean

USABLE = 15.75 / 16  # of a chip's memory; the rest runtimes keep for themselves: so XLA says of a v5e
_TPU = "https://cloud.google.com/tpu/docs/"
_GPU = "https://www.nvidia.com/en-us/data-center/"
_CARD = "https://www.nvidia.com/en-us/geforce/graphics-cards/"
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "2x2x1",
    "2x2x2",
    "2x2x4",
    "2x4x4",
    *("x".join(map(str, sizes)) for sizes in itertools.combinations_with_replacement(range(4, 29, 4), 3)),
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator; figures of one device, as JAX counts them.

    Attributes:
        name: as topologies are written.
        memory: bytes of HBM.
        flops: bfloat16 multiply-adds times two, per second, dense.
        bandwidth: bandwidth of HBM, bytes per second.
        links: to other chips of its slice or node, bytes per second, both directions together.
        source: page with these numbers.
        slices: shapes of TPU slices that are let; programs for them can be compiled without having one.
        devices: number of devices of one chip.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    links: float
    source: str
    slices: tuple[str, ...] = ()
    devices: int = 1


_G = 10**9
ANY_GPU = "gpu"  # of which --memory says what it has
# Of `v4-8` and `v5p-8` the number counts TensorCores, two a chip; of the others it counts chips.
_CORES = ("v4", "v5p")
_ALSO = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x", "ironwood": "tpu7x", "trillium": "v6e"}
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * 2**30, 275e12, 1200 * _G, 300 * _G, _TPU + "v4", _CUBES),
        Chip("v5e", 16 * 2**30, 197e12, 819 * _G, 200 * _G, _TPU + "v5e", _FLAT),
        Chip("v5p", 95 * 2**30, 459e12, 2765 * _G, 600 * _G, _TPU + "v5p", _CUBES),
        Chip("v6e", 32 * 2**30, 918e12, 1638 * _G, 448 * _G, _TPU + "v6e", _FLAT),
        Chip("tpu7x", 96 * 2**30, 1153e12, 3690 * _G, 600 * _G, _TPU + "tpu7x", _CUBES, 2),
        Chip("a100", 80 * 2**30, 312e12, 2039 * _G, 600 * _G, _GPU + "a100"),
        Chip("a100-40gb", 40 * 2**30, 312e12, 1555 * _G, 600 * _G, _GPU + "a100"),
        Chip("h100", 80 * 2**30, 989e12, 3350 * _G, 900 * _G, _GPU + "h100"),
        Chip("h200", 141 * 10**9, 989e12, 4800 * _G, 900 * _G, _GPU + "h200"),
        Chip("b200", 180 * 10**9, 2250e12, 7700 * _G, 1800 * _G, _GPU + "dgx-b200"),
        Chip("a10", 24 * 2**30, 125e12, 600 * _G, 64 * _G, _GPU + "products/a10-gpu"),
        Chip("a10g", 24 * 2**30, 70e12, 600 * _G, 64 * _G, "https://aws.amazon.com/ec2/instance-types/g5/"),
        Chip("l4", 24 * 2**30, 121e12, 300 * _G, 64 * _G, _GPU + "l4"),
        Chip("l40s", 48 * 2**30, 362e12, 864 * _G, 64 * _G, _GPU + "l40s"),
        Chip("rtx3090", 24 * 2**30, 71e12, 936 * _G, 64 * _G, _CARD + "30-series/rtx-3090-3090ti"),
        Chip("rtx4080", 16 * 2**30, 97.5e12, 717 * _G, 64 * _G, _CARD + "40-series/rtx-4080-family"),
        Chip("rtx4090", 24 * 2**30, 165.2e12, 1008 * _G, 64 * _G, _CARD + "40-series/rtx-4090"),
        Chip("rtx5090", 32 * 2**30, 209.5e12, 1792 * _G, 128 * _G, _CARD + "50-series/rtx-5090"),
        Chip(ANY_GPU, 0, math.inf, math.inf, math.inf, "of a GPU that is not in this list no speed is known"),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that run one program.

    Attributes:
        name: as given.
        chip: which.
        devices: how many.
    """

    name: str
    chip: Chip
    devices: int

    @classmethod
    def parse(cls, text: str, memory: str = "") -> Topology:
        """Reads ``v5e:4x4`` (a TPU slice), ``h100:8`` or ``h200:2x8`` (nodes x GPUs), and other ways to write them.

        ``v5e-8``, ``v5litepod-8`` and ``v5e:8`` are the slice of so many chips, ``v5p-16`` that of so many cores, as
        Google counts them; ``H100``, ``RTX 4090`` and ``a100-80gb`` are one GPU, of so much memory.

        Args:
            text: topology.
            memory: memory of a device, such as ``24GiB``, in place of the chip's; empty for the chip's.

        Raises:
            UserError: another form, a chip that is not in `CHIPS`, a slice that there is not, or no size of memory.
        """
        chip, sizes, said = _spelled(text)
        devices = _count(sizes)
        if not devices:
            raise UserError(f"--topology={text}: expected at least one chip")
        if chip.slices and "x" not in sizes:
            sizes = next((name for name in chip.slices if _count(name) == devices), sizes)
        if chip.slices and sizes not in chip.slices:
            near = sorted(chip.slices, key=lambda name: abs(math.log(_count(name) / devices)))[:3]
            raise UserError(
                f"--topology={text}: no such slice; nearest: {', '.join(f'{chip.name}:{name}' for name in near)}"
            )
        if room := _bytes(memory, "--memory=") if memory else said:
            chip = dataclasses.replace(chip, memory=room)
        if not chip.memory:
            raise UserError(f"--topology={text}: a GPU that is not in the list; give --memory too, such as 24GiB")
        return cls(f"{chip.name}:{sizes}", chip, devices * chip.devices)


def _spelled(text: str) -> tuple[Chip, str, float]:
    """The chip, the sizes and the memory (0 where it is not said) that a topology names, however it is spelled."""
    word = re.sub(r"[\s_]+", "-", text.lower().strip())
    name, _, sizes = re.sub(r"-?(sxm\d?|pcie|nvl|hbm\d?e?)(?=-|:|$)", "", word).partition(":")
    if sizes and not re.fullmatch(r"\d+(x\d+)*", sizes):
        name = ""
    chip, tpu, gpu = CHIPS.get(_known(name)), *(re.fullmatch(form, name) for form in (r"(.+)-(\d+)", r"(.+)-(\d+g.*)"))
    if chip is not None:
        if chip.slices and not sizes:
            raise UserError(f"--topology={text}: how many? expected a slice such as {chip.name}:{chip.slices[1]}")
        return chip, sizes or "1", 0.0
    if tpu and not sizes and (chip := CHIPS.get(_known(tpu[1]))) and chip.slices:  # Google's accelerator types
        count = int(tpu[2])
        if chip.devices > 1:
            raise UserError(f"--topology={text}: chips or cores? expected a slice such as {chip.name}:2x2x1")
        if chip.name in _CORES and count % 2:
            raise UserError(f"--topology={text}: counts cores, two a chip; expected an even number")
        return chip, str(count // (2 if chip.name in _CORES else 1)), 0.0
    if gpu and (chip := CHIPS.get(_known(gpu[1]))) and not chip.slices:  # a100-80gb
        return chip, sizes or "1", _bytes(gpu[2], f"--topology={text}: ")
    raise UserError(
        f"--topology={text}: expected a name such as v5e:4x4, v5e-16, h100:8 or 4090, of {', '.join(CHIPS)} (gpu: any"
        f" other, with --memory){did_you_mean(name, CHIPS)}"
    )


def _known(name: str) -> str:
    """The key of `CHIPS` that a name stands for, or the name."""
    plain = re.sub(r"^((nvidia|geforce|tpu)-?)+(?!7x)", "", name)
    plain = _ALSO.get(plain, plain)
    return next((one for one in (plain, f"rtx{plain}", plain.replace("rtx-", "rtx")) if one in CHIPS), name)


def _bytes(text: str, flag: str) -> float:
    """Bytes of ``24GiB``, ``24GB`` or ``24``; chips are sold by the former and labelled by the latter."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(g|gb|gib|)", text.strip().lower())
    if not found or not (size := float(found[1])):
        raise UserError(f"{flag}{text}: expected gibibytes of a device, such as 24GiB")
    return size * 2**30


def _count(sizes: str) -> int:
    return math.prod(int(size) for size in sizes.split("x"))
