"""Are critical layers the same whatever the data? The paper's figure, on any model.

    python experiments/representation_dynamics.py [flags of jaxcrit analyze]

By default the embedded model and its prompt families; the paper's own with
``--model=DIR --data=dolly:FILE,alpaca:FILE,gsm8k:FILE,boolq:FILE,openbookqa:FILE --edition=paper --bias=biased``.
The run directory gets, beside what ``jaxcrit analyze`` writes (``delta.png``: one curve per dataset, ``*/cka.png``: the
heat maps), ``agreement.json`` with the matrices printed here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from entry import leave
from scipy.stats import spearmanr

from jaxcrit.core import flags
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import write_json
from jaxcrit.core.groups import AnalyzeOptions
from jaxcrit.core.progress import bars
from jaxcrit.reporting.analysis import analysis_report
from jaxcrit.reporting.tables import aligned
from jaxcrit.selection import overlap_matrix, spearman_matrix
from jaxcrit.studies.analysis import run_analysis

# Llama-2-7B-chat, printed in the paper's figure: Spearman's correlation of δ over layers 2 to 29.
PAPER = ("dolly", "alpaca", "openbookqa", "gsm8k", "boolq")
PRINTED = np.array(
    [
        [1.00, 0.78, 0.82, 0.87, 0.76],
        [0.78, 1.00, 0.86, 0.94, 0.92],
        [0.82, 0.86, 1.00, 0.89, 0.95],
        [0.87, 0.94, 0.89, 1.00, 0.91],
        [0.76, 0.92, 0.95, 0.91, 1.00],
    ]
)


def table(title: str, names: Sequence[str], matrix: np.ndarray) -> str:
    """A square matrix with its names."""
    rows = [[*(f"{value:.2f}" for value in row), name] for row, name in zip(matrix, names, strict=True)]
    return "\n".join([title, *aligned([*names, ""], rows)])


def mean_off_diagonal(matrix: np.ndarray) -> float:
    """Mean over the pairs."""
    return float(np.mean(matrix[np.triu_indices_from(matrix, 1)]))


def main(arguments: Sequence[str]) -> None:
    """Analyses, prints the matrices, writes them."""
    (options,) = flags.read([AnalyzeOptions], "representation_dynamics", arguments)
    analysis = run_analysis(options, progress=bars)
    if len(analysis.datasets) < 2:
        raise UserError("representation_dynamics: expected two datasets or more to compare, got one")
    names = list(analysis.datasets)
    key = analysis.config.criterion
    scores = [result.scores[key] for result in analysis.datasets.values()]
    correlation = spearman_matrix(scores)
    overlap = overlap_matrix([result.chosen for result in analysis.datasets.values()])
    valid = [np.flatnonzero(score.valid) for score in scores]
    depth = {
        name: float(spearmanr(layers, score.values[layers]).statistic)
        for name, score, layers in zip(names, scores, valid, strict=True)
    }
    report = analysis_report(analysis).write(analysis.out, analysis.run)
    write_json(
        analysis.out / "agreement.json",
        "jaxcrit.agreement",
        {
            "datasets": names,
            "criterion": key,
            "spearman": np.where(np.isnan(correlation), None, correlation).tolist(),
            "overlap": overlap.tolist(),
            "spearman_with_depth": depth,
            "consensus": list(analysis.chosen.layers),
        },
    )
    print(
        table(
            f"Spearman's correlation of {key} between datasets (mean {mean_off_diagonal(correlation):.2f}):",
            names,
            correlation,
        )
    )
    print(
        f"\nof {key} with depth, a trend that curves may share: "
        + ", ".join(f"{n} {rho:+.2f}" for n, rho in depth.items())
    )
    print(
        "\n" + table(f"Share of the chosen layers in common (mean {mean_off_diagonal(overlap):.2f}):", names, overlap)
    )
    for name, result in analysis.datasets.items():
        print(f"  {name}: {result.chosen}")
    print(f"  consensus: {analysis.chosen}\n")
    published = f"The paper's matrix, Llama-2-7B-chat (mean {mean_off_diagonal(PRINTED):.2f}):"
    print(table(published, PAPER, PRINTED) + f"\n\nreport: {report}")


if __name__ == "__main__":
    leave(lambda: main(sys.argv[1:]))
