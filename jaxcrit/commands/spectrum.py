"""``jaxcrit spectrum``: flags are the fields of `jaxcrit.studies.spectrum.SpectrumConfig`."""

from __future__ import annotations

from typing import Any

from absl.flags import FlagValues

from jaxcrit.commands import analyze
from jaxcrit.commands.data import RENDERING, ROWS
from jaxcrit.core.flags import Flag

_ANALYZE = {flag.name: flag for group in analyze.FLAGS.values() for flag in group}
FLAGS = {
    "what": (
        _ANALYZE["model"],
        Flag("run", "", "an earlier analyze run, instead of model and data", word="DIR"),
        *ROWS,
        _ANALYZE["out"],
        *RENDERING,
    ),
    "capture": tuple(
        _ANALYZE[name] for name in ("position", "batch_size", "dtype", "precision", "mesh", "normalize", "kernel")
    ),
    "scores": (
        Flag("k", "1,3,10", "numbers of principal components, with commas", word="LIST"),
        Flag("window", 5, "layers that δ and CCA average over; odd", lowest=3),
        _ANALYZE["include_self"],
        Flag("bias", "debiased", "which δ is tracked", ("debiased", "biased")),
    ),
}


def run(values: FlagValues) -> int:
    """Decomposes, writes the report, prints the tables."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.spectrum import spectrum_text, write_spectrum
    from jaxcrit.studies.spectrum import SpectrumConfig, run_spectrum

    given: dict[str, Any] = {flag.name: values[flag.name].value for group in FLAGS.values() for flag in group}
    analysis = run_spectrum(SpectrumConfig(**given), progress=bars)
    report = write_spectrum(analysis)
    print(spectrum_text(analysis))
    print(f"report: {report}")
    return 0
