"""What accelerators can do, from their makers' public pages; ceilings, not measurements."""

from __future__ import annotations

import dataclasses
import math
import re

from jaxcrit.core.errors import UserError, did_you_mean

_TPU = "https://cloud.google.com/tpu/docs/"
_GPU = "https://www.nvidia.com/en-us/data-center/"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
        name: as topologies are written.
        memory: bytes of HBM.
        flops: bfloat16 multiply-adds times two, per second, dense.
        bandwidth: of HBM, bytes per second.
        links: to other chips of its slice or node, bytes per second, both directions together.
        source: page with these numbers.
        tpu: whether programs for it can be compiled without having one.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    links: float
    source: str
    tpu: bool


_G = 10**9
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * 2**30, 275e12, 1200 * _G, 300 * _G, _TPU + "v4", True),
        Chip("v5e", 16 * 2**30, 197e12, 819 * _G, 200 * _G, _TPU + "v5e", True),
        Chip("v5p", 95 * 2**30, 459e12, 2765 * _G, 600 * _G, _TPU + "v5p", True),
        Chip("v6e", 32 * 2**30, 918e12, 1638 * _G, 448 * _G, _TPU + "v6e", True),
        Chip("tpu7x", 192 * 2**30, 2307e12, 7380 * _G, 1200 * _G, _TPU + "tpu7x", True),
        Chip("a100", 80 * 2**30, 312e12, 2039 * _G, 600 * _G, _GPU + "a100", False),
        Chip("h100", 80 * 2**30, 989e12, 3350 * _G, 900 * _G, _GPU + "h100", False),
        Chip("h200", 141 * 10**9, 989e12, 4800 * _G, 900 * _G, _GPU + "h200", False),
        Chip("b200", 180 * 10**9, 2250e12, 7700 * _G, 1800 * _G, _GPU + "dgx-b200", False),
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
            UserError: another form, or a chip that is not in `CHIPS`.
        """
        found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
        word = text.split(":")[0]
        if word not in CHIPS or not found:
            raise UserError(
                f"--topology={text}: expected a name such as v5e:4x4, v5p:2x2x2 or h100:8, of"
                f" {', '.join(CHIPS)}{did_you_mean(word, CHIPS) if word not in CHIPS else ''}"
            )
        devices = math.prod(int(size) for size in found[2].split("x"))
        if not devices:
            raise UserError(f"--topology={text}: expected at least one chip")
        return cls(text, CHIPS[word], devices)
