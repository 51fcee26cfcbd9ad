"""``jaxcrit spectrum``: principal components of every layer, and which of them track δ."""

from __future__ import annotations

import dataclasses

from jaxcrit.commands.analyze import AnalyzeOptions, CaptureOptions
from jaxcrit.core.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectrumOptions(CaptureOptions, title="scores"):
    """What ``jaxcrit spectrum`` is asked."""

    run: str = option("", "an earlier analyze run, instead of model and data", word="DIR", group="model and data")
    k: str = option("1,3,10", "numbers of principal components, with commas", word="LIST")

    def analysis(self) -> AnalyzeOptions:
        """The same as far as it is about capturing and δ."""
        shared = {field.name for field in dataclasses.fields(AnalyzeOptions)}
        return AnalyzeOptions(**{key: value for key, value in dataclasses.asdict(self).items() if key in shared})


OPTIONS = SpectrumOptions


def run(options: SpectrumOptions) -> int:
    """Decomposes, writes the report, prints the tables."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.spectrum import spectrum_report
    from jaxcrit.studies.spectrum import SpectralAnalysis, run_spectrum

    def finish(found: SpectralAnalysis) -> None:
        spectrum_report(found).write(found.out, found.run)

    analysis = run_spectrum(options, progress=bars, finish=finish)
    print(spectrum_report(analysis).text())
    print(f"report: {analysis.out / 'report.html'}")
    return 0
