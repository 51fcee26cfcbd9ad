"""Overlays: what a fine-tuning run, an adapter or an edit changes of a model; dense or low-rank arrays by layer."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxcrit.core import processes
from jaxcrit.core.digests import CHECKPOINTS, refuse_differing
from jaxcrit.core.errors import UserError
from jaxcrit.core.layers import LayerSet
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.gains import Gain, parse_gains
from jaxcrit.models.partition import Bank, Partition, partition, partition_of_json, split
from jaxcrit.parallel.mesh import AnyMesh


@dataclasses.dataclass(frozen=True, eq=False)
class Overlay:
    """What changes in a model.

    Attributes:
        partition: which weights, and whether whole or by adapters.
        params: by group and weight-table path the new values (or adapters), float32.
        run: directory of the run or adapter it was read from (``ADAPTER@BASE`` where its base was named too); None
            where it was made in memory.
        step: optimizer step of the checkpoint read; 0 where there is none.
        chosen: layers that were asked for, and what they were chosen by; None where nobody chose.
        gains: gains under which ``params`` were trained; the model has them folded into its weights.
    """

    partition: Partition
    params: Bank
    run: Path | None
    step: int
    chosen: LayerSet | None = None
    gains: tuple[Gain, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose weights change: those that were trained, and all that gains are folded into."""
        first = min((gain.layer for gain in self.gains), default=self.partition.config.num_layers)
        return tuple(sorted({*self.partition.layers, *range(first, self.partition.config.num_layers)}))

    def identity(self) -> dict[str, Any]:
        """JSON values that tell it apart: what changes, and a digest of every array."""
        digests = {
            f"{group}/{path}": hashlib.sha256(np.ascontiguousarray(processes.whole(value)).tobytes()).hexdigest()
            for group, entries in self.params.items()
            for path, value in entries.items()
        }
        found = {"trained": self.partition.to_json(), "params": digests}
        return found | {"gains": list(map(str, self.gains))} if self.gains else found


def read_overlay(run: Path, config: ModelConfig, mesh: AnyMesh, record: Mapping[str, Any], step: str) -> Overlay:
    """Reads what a fine-tuning run changed.

    Args:
        run: run directory.
        config: configuration of the model below.
        mesh: devices that the arrays are placed on.
        record: content of its ``run.json``.
        step: which checkpoint, see `trained_parameters`.

    Raises:
        UserError: see `trained_parameters`.
    """
    from jaxcrit.models.trained import trained_parameters  # orbax takes 25 MB, and plans do without

    try:
        parts = partition_of_json(config, record["trained"])
        chosen = LayerSet.from_json(record["layers"], "layers")
        gains = parse_gains(record["trained"].get("gain", ""), config)
    except UserError as error:
        raise UserError(f"{run / 'run.json'}: {error}") from None
    files = record.get("digests", {}).get("files", {})
    which = f"{CHECKPOINTS}/{step}/" if step.isdigit() else f"{CHECKPOINTS}/"
    processes.share(lambda: refuse_differing(run, files, below=which))
    selections = record["trained"].get("selections", [])

    def parts_at(number: int) -> Partition:  # of layers that are chosen anew, those that had been by then
        layers = {layer for one in selections if one["step"] < number for layer in one["layers"]}
        return partition(config, layers, parts.outside_asked) if selections else parts

    like = lambda number: split(parts_at(number).abstract(mesh, np.float32))[0]  # noqa: E731
    params, found = trained_parameters(run, like, step)
    return Overlay(parts_at(found), params, run.resolve(), found, chosen, gains)
