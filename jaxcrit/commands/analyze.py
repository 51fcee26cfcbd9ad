"""``jaxcrit analyze``: the critical layers of a model, and how sure that is."""

from __future__ import annotations

import dataclasses
import sys
from typing import Literal

from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import BatchOptions, MeshOptions, ModelOptions, OutOptions, PrecisionOptions, RowOptions
from jaxcrit.core.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptureOptions(
    ModelOptions, RowOptions, OutOptions, BatchOptions, PrecisionOptions, MeshOptions, title="capture"
):
    """What is captured, and how δ is computed from it."""

    position: Literal["last", "mean", "all"] = option("last", "token that stands for a prompt", ("last", "mean", "all"))
    normalize: str = option("", "row: every sample's activations to unit length first", ("row",), group="scores")
    kernel: Literal["linear", "rbf"] = option("linear", "kernel of CKA", ("linear", "rbf"), group="scores")
    window: int = option(5, "layers that δ averages over; odd", lowest=3, group="scores")
    include_self: bool = option(True, "count the layer itself in its window", group="scores")
    bias: str = option("debiased", "which δ selects", ("debiased", "biased"), group="selection")

    def check(self) -> None:
        """Refuses an even window, which has no middle."""
        super().check()
        if self.window % 2 == 0:
            raise UserError(f"--window={self.window}: expected an odd number, 3 or more (a layer and its neighbours)")

    @property
    def criterion(self) -> str:
        """Score key that selects."""
        return "delta" if self.bias == "biased" else "delta_debiased"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalyzeOptions(CaptureOptions, title="scores"):
    """What ``jaxcrit analyze`` is asked."""

    embed: bool = option(False, "capture the embedding output too", group="capture")
    save_activations: bool = option(False, "keep activations.safetensors in the run directory", group="capture")
    form: str = option("auto", "form of the sweep", ("auto", "resident", "tiled", "features", "streamed"), word="FORM")
    band: str = option("all", "compute CKA only of layers up to so many apart", word="N|all")
    measures: str = option("", "also procrustes,rsa,rsa_spearman,knn,cca,svcca", word="NAMES")
    layers: str = option("critical", "critical:K, noncritical:K, first:K, 3-5,9, ...", word="SPEC", group="selection")
    trim: int = option(2, "layers at each end that are never critical", lowest=0, group="selection")
    seed: int = option(0, "seed of everything random", lowest=0, group="selection")

    def check(self) -> None:
        """Checks the band, and that what is captured besides is kept."""
        super().check()
        _ = self.layer_band
        if self.embed and not self.save_activations:
            raise UserError("--embed adds the embedding output to what --save_activations keeps; give both")

    @property
    def layer_band(self) -> int | None:
        """``--band`` as a number; None for all pairs.

        Raises:
            UserError: neither a number nor all, or narrower than the window.
        """
        if self.band == "all":
            return None
        if not self.band.isdecimal():
            raise UserError(f"--band={self.band}: expected all, or a number of layers")
        if int(self.band) < self.window // 2:
            raise UserError(
                f"--band={self.band}: δ of --window={self.window} takes layers up to {self.window // 2} apart; give"
                f" --band={self.window // 2} or more"
            )
        return int(self.band)


OPTIONS = AnalyzeOptions


def run(options: AnalyzeOptions) -> int:
    """Analyses, writes the report, prints the table."""
    from jaxcrit.core.progress import bars
    from jaxcrit.reporting.analysis import analysis_report, write_selections
    from jaxcrit.studies.analysis import Analysis, run_analysis

    def finish(analysis: Analysis) -> None:
        write_selections(analysis)
        analysis_report(analysis).write(analysis.out, analysis.run)

    analysis = run_analysis(options, progress=bars, finish=finish)
    print(analysis_report(analysis).text(style=sys.stdout.isatty()))
    print(f"report: {analysis.out / 'report.html'}")
    return 0
