"""``jaxcrit export``: a model in, a checkpoint directory that `transformers` loads out."""

from __future__ import annotations

from absl.flags import FlagValues

from jaxcrit.cli.flags import Flag
from jaxcrit.core.errors import UserError

FLAGS = {
    "what": (
        Flag("model", "", "checkpoint directory or hub id", word="DIR"),
        Flag("out", "", "directory to write; must not exist yet or be empty", word="DIR"),
        Flag("dtype", "", "of the weights (default: as read)", ("float32", "bfloat16", "float16")),
    ),
}


def run(values: FlagValues) -> int:
    """Loads and writes."""
    for name in ("model", "out"):
        if not values[name].value:
            raise UserError(f"export: expected --{name}=DIR")
    from jaxcrit.cli.progress import bars
    from jaxcrit.models.export import export

    with bars(total=1, desc="weights", unit=" tensors") as bar:

        def progress(done: int, total: int, _: str) -> None:
            bar.total = total
            bar.update(done - bar.n)

        out = export(values.model, values.out, dtype=values.dtype, progress=progress)
    print(out)
    return 0
