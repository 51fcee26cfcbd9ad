"""``jaxcrit export``: a model or a fine-tuning run in, a checkpoint directory that transformers loads out."""

from __future__ import annotations

import dataclasses

from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import BY_HASH, WHERE
from jaxcrit.core.options import Options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions(Options, title="what"):
    """What ``jaxcrit export`` is asked."""

    model: str = option("", "checkpoint directory or hub id", word="DIR", free=BY_HASH)
    run: str = option("", "instead: run of jaxcrit finetune", word="DIR", free=BY_HASH)
    out: str = option("", "directory to write; must not exist yet or be empty", word="DIR", free=WHERE)
    dtype: str = option("source", "dtype of the weights; source: as read", ("float32", "bfloat16", "float16"))
    step: str = option("", "of a run: checkpoint N, best or last (default: where it ended)", word="N|best|last")
    delta_only: bool = option(False, "of a run: just the trained tensors, as delta.safetensors")
    adapter: bool = option(False, "of a run with --lora_rank: the adapters, for peft")


OPTIONS = ExportOptions


def run(options: ExportOptions) -> int:
    """Loads and writes; says what rounding cost."""
    if bool(options.model) == bool(options.run):
        raise UserError("export: expected --model=DIR or --run=DIR, one of them")
    if not options.out:
        raise UserError("export: expected --out=DIR")
    from jaxcrit.core.progress import bars
    from jaxcrit.studies.exporting import export_model

    with bars(total=1, desc="weights", unit=" tensors") as bar:

        def progress(done: int, total: int, _: str) -> None:
            bar.total = total
            bar.update(done - bar.n)

        exported = export_model(
            options.model or options.run,
            options.out,
            dtype=options.dtype,
            delta_only=options.delta_only,
            adapter=options.adapter,
            step=options.step,
            progress=progress,
        )
    if exported.step is not None:
        print(f"checkpoint of step {exported.step}")
    if exported.rounding is not None:
        print(exported.rounding)
    print(exported.out)
    return 0
