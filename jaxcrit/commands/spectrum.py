"""``jaxcrit spectrum``: principal components of every layer, and which of them track δ."""

from __future__ import annotations

from jaxcrit.studies.options import SpectrumOptions

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
