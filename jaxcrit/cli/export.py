"""``jaxcrit export``: a model in, a checkpoint directory that `transformers` loads out."""

from __future__ import annotations

from pathlib import Path

from absl.flags import FlagValues

from jaxcrit.cli.flags import Flag
from jaxcrit.core.errors import UserError

FLAGS = {
    "what": (
        Flag("model", "", "checkpoint directory or hub id", word="DIR"),
        Flag("out", "", "directory to write; must not exist yet or be empty", word="DIR"),
        Flag("dtype", "source", "of the weights; source keeps what was read", ("source", "float32", "bfloat16")),
    ),
}


def run(values: FlagValues) -> int:
    """Loads and writes."""
    for name in ("model", "out"):
        if not values[name].value:
            raise UserError(f"export: expected --{name}=DIR")
    from jaxcrit.models.export import export

    export(values.model, Path(values.out), values.dtype)
    print(values.out)
    return 0
