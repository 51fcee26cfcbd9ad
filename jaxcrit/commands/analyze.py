"""``jaxcrit analyze``: flags are the fields of `jaxcrit.studies.analysis.AnalysisConfig`."""

from __future__ import annotations

import sys
from typing import Any

from absl.flags import FlagValues

from jaxcrit.commands.data import RENDERING, ROWS
from jaxcrit.core.flags import Flag

FLAGS = {
    "what": (
        Flag("model", "", "checkpoint directory or hub id (default: the embedded model)", word="DIR"),
        *ROWS,
        Flag("out", "", "run directory to write (default: a new one here)", word="DIR"),
        *RENDERING,
    ),
    "capture": (
        Flag("position", "last", "token that stands for a prompt", ("last", "mean", "all")),
        Flag("embed", False, "capture the embedding output too"),
        Flag("save_activations", False, "keep activations.safetensors in the run directory"),
        Flag("batch_size", 8, "prompts per forward pass", lowest=1),
        Flag("dtype", "", "of weights and compute (default: float32 on CPU, else as read)", ("float32", "bfloat16")),
        Flag("precision", "highest", "of matrix products", ("default", "high", "highest")),
        Flag("mesh", "", "devices by axis, such as data=4,fsdp=2 (default: by model size)", word="AXES"),
    ),
    "scores": (
        Flag("normalize", "", "row: every sample's activations to unit length first", ("row",)),
        Flag("kernel", "linear", "of CKA", ("linear", "rbf")),
        Flag("form", "auto", "of the sweep", ("auto", "resident", "tiled", "features", "streamed"), word="FORM"),
        Flag("band", "all", "compute CKA only of layers up to so many apart", word="N|all"),
        Flag("window", 5, "layers that δ averages over; odd", lowest=3),
        Flag("include_self", True, "count the layer itself in its window"),
        Flag("measures", "", "also procrustes,rsa,rsa_spearman,knn,cca,svcca", word="NAMES"),
    ),
    "selection": (
        Flag("layers", "critical", "critical:K, noncritical:K, first:K, 3-5,9, ...", word="SPEC"),
        Flag("bias", "debiased", "which δ selects", ("debiased", "biased")),
        Flag("trim", 2, "layers at each end that are never critical", lowest=0),
        Flag("seed", 0, "of everything random", lowest=0),
    ),
}


def run(values: FlagValues) -> int:
    """Analyses, writes the report, prints the table."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.analysis import analysis_text, write_analysis
    from jaxcrit.studies.analysis import AnalysisConfig, run_analysis

    given: dict[str, Any] = {flag.name: values[flag.name].value for group in FLAGS.values() for flag in group}
    config = AnalysisConfig(**given)
    analysis = run_analysis(config, progress=bars)
    report = write_analysis(analysis)
    print(analysis_text(analysis, style=sys.stdout.isatty()))
    print(f"report: {report}")
    return 0
