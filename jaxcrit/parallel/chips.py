"""What accelerators can do, from their makers' public pages; ceilings, not measurements."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

from jaxcrit.core.errors import UserError, did_you_mean

_TPU = "https://cloud.google.com/tpu/docs/"
_GPU = "https://www.nvidia.com/en-us/data-center/"
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
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * 2**30, 275e12, 1200 * _G, 300 * _G, _TPU + "v4", _CUBES),
        Chip("v5e", 16 * 2**30, 197e12, 819 * _G, 200 * _G, _TPU + "v5e", _FLAT),
        Chip("v5p", 95 * 2**30, 459e12, 2765 * _G, 600 * _G, _TPU + "v5p", _CUBES),
        Chip("v6e", 32 * 2**30, 918e12, 1638 * _G, 448 * _G, _TPU + "v6e", _FLAT),
        Chip("tpu7x", 96 * 2**30, 1153e12, 3690 * _G, 600 * _G, _TPU + "tpu7x", _CUBES, 2),
        Chip("a100", 80 * 2**30, 312e12, 2039 * _G, 600 * _G, _GPU + "a100"),
        Chip("h100", 80 * 2**30, 989e12, 3350 * _G, 900 * _G, _GPU + "h100"),
        Chip("h200", 141 * 10**9, 989e12, 4800 * _G, 900 * _G, _GPU + "h200"),
        Chip("b200", 180 * 10**9, 2250e12, 7700 * _G, 1800 * _G, _GPU + "dgx-b200"),
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
    def parse(cls, text: str) -> Topology:
        """Reads ``v5e:4x4`` (a TPU slice), ``h100:8`` or ``h200:2x8`` (nodes x GPUs).

        Raises:
            UserError: another form, a chip that is not in `CHIPS`, or a slice that there is not.
        """
        found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
        word = text.split(":")[0]
        if word not in CHIPS or not found:
            raise UserError(
                f"--topology={text}: expected a name such as v5e:4x4, v5p:2x2x2 or h100:8, of"
                f" {', '.join(CHIPS)}{did_you_mean(word, CHIPS) if word not in CHIPS else ''}"
            )
        devices = _count(found[2])
        if not devices:
            raise UserError(f"--topology={text}: expected at least one chip")
        chip = CHIPS[word]
        if chip.slices and found[2] not in chip.slices:
            near = sorted(chip.slices, key=lambda name: abs(math.log(_count(name) / devices)))[:3]
            raise UserError(
                f"--topology={text}: no such slice; nearest: {', '.join(f'{word}:{name}' for name in near)}"
            )
        return cls(text, chip, devices * chip.devices)


def _count(sizes: str) -> int:
    return math.prod(int(size) for size in sizes.split("x"))
