"""``jaxcrit export``: a model or a fine-tuning run in, a checkpoint directory that `transformers` loads out."""

from __future__ import annotations

from absl.flags import FlagValues

from jaxcrit.core.errors import UserError
from jaxcrit.core.flags import Flag

FLAGS = {
    "what": (
        Flag("model", "", "checkpoint directory or hub id", word="DIR"),
        Flag("run", "", "instead: run of jaxcrit finetune", word="DIR"),
        Flag("out", "", "directory to write; must not exist yet or be empty", word="DIR"),
        Flag("dtype", "source", "of the weights; source: as read", ("float32", "bfloat16", "float16")),
        Flag("step", "", "of a run: checkpoint N, best or last (default: where it ended)", word="N|best|last"),
        Flag("delta_only", False, "of a run: just the trained tensors, as delta.safetensors"),
        Flag("adapter", False, "of a run with --lora_rank: the adapters, for peft"),
    ),
}


def run(values: FlagValues) -> int:
    """Loads and writes; says what rounding cost."""
    if bool(values.model) == bool(values.run):
        raise UserError("export: expected --model=DIR or --run=DIR, one of them")
    if not values.out:
        raise UserError("export: expected --out=DIR")
    from jaxcrit.core.progress import bars
    from jaxcrit.studies.exporting import export_model

    with bars(total=1, desc="weights", unit=" tensors") as bar:

        def progress(done: int, total: int, _: str) -> None:
            bar.total = total
            bar.update(done - bar.n)

        exported = export_model(
            values.model or values.run,
            values.out,
            dtype=values.dtype,
            delta_only=values.delta_only,
            adapter=values.adapter,
            step=values.step,
            progress=progress,
        )
    if exported.step is not None:
        print(f"checkpoint of step {exported.step}")
    if exported.rounding is not None:
        print(exported.rounding)
    print(exported.out)
    return 0
