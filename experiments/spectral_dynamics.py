"""Which principal components move where δ is low? The paper's figure, on any model.

    python experiments/spectral_dynamics.py [flags of jaxcrit spectrum]

By default the embedded model and its prompt families; the paper's own with ``--model=DIR --data=dolly:FILE
--edition=paper``. The run directory gets, beside what ``jaxcrit spectrum`` writes (``spectrum.png``: CCA of the top 1,
3 and 10 components over bars of δ), ``spectral_dynamics.json`` with what is printed here: how each curve goes along
with δ, biased (the paper's) and debiased, and what that is worth. The paper shows the curves of one model on one
dataset, without a test, and points at the top 3.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from entry import leave

from jaxcrit.commands.spectrum import SpectrumOptions, run_spectrum
from jaxcrit.commands.spectrum import report as spectrum_report
from jaxcrit.core import flags
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import plain, write_json
from jaxcrit.core.layers import LayerScores
from jaxcrit.core.progress import bars
from jaxcrit.reporting.tables import aligned
from jaxcrit.selection.tracking import Tracking, tracking

# PAPER: Llama-2-7B-chat on Dolly, layers 2 to 29, read off its figure: Spearman's ρ with biased δ, and the p of all
# circular shifts of the one curve against the other, which the paper does not give.
PAPER = {1: (-0.32, 0.61), 3: (0.86, 0.07), 10: (0.71, 0.11)}
REFERENCES = ("delta", "delta_debiased")


def tracked(scores: Mapping[str, LayerScores], ks: Sequence[int]) -> dict[str, Tracking]:
    """How the CCA curves go along with either δ; without an entry where there is nothing to correlate."""
    found = {}
    for key in REFERENCES:
        try:
            found[key] = tracking(scores[key], [scores[f"cca_{k}"] for k in ks])
        except UserError as error:
            print(f"spectral_dynamics: {key}: {error}", file=sys.stderr)
    return found


def table(everything: Mapping[str, Mapping[str, Tracking]], ks: Sequence[int], key: str) -> str:
    """ρ (and p) of every curve with one δ, a row per dataset; the last row is the paper's."""
    rows = []
    for name, found in everything.items():
        if key in found:
            ones = [found[key].correlations[f"cca_{k}"] for k in ks]
            best = found[key]
            rows.append(
                [
                    *(f"{one.rho:+.2f} ({one.p_shift:.2f})" for one in ones),
                    best.best.removeprefix("cca_"),
                    f"{best.p_best:.2f}",
                    name,
                ]
            )
    if rows:
        means = [np.mean([f[key].correlations[f"cca_{k}"].rho for f in everything.values() if key in f]) for k in ks]
        rows.append([*(f"{mean:+.2f}       " for mean in means), "", "", "mean over datasets"])
    if key == "delta":
        paper = [f"{PAPER[k][0]:+.2f} ({PAPER[k][1]:.2f})" if k in PAPER else "" for k in ks]
        rows.append([*paper, "3", "0.07", "the paper's figure (Llama-2-7B-chat, Dolly)"])
    return "\n".join(aligned([*(f"top {k}" for k in ks), "best", "p(best)", ""], rows))


def told(content: Mapping[str, Any]) -> str:
    """Both tables, from what ``spectral_dynamics.json`` holds."""
    ks, everything = content["k"], {}
    for name, one in content["datasets"].items():
        everything[name] = tracked({key: LayerScores.from_json(key, curve) for key, curve in one["curves"].items()}, ks)
    lines = []
    for key, word in (("delta", "biased, the paper's"), ("delta_debiased", "debiased")):
        lines += [f"Spearman's ρ of CCA with δ ({word}); in brackets p of all circular shifts:"]
        lines += [table(everything, ks, key), ""]
    pairs = [one for found in everything.values() for both in found.values() for one in both.correlations.values()]
    least = 1 / max([1, *(one.num_layers for one in pairs)])
    return "\n".join([*lines, f"p cannot be below {least:.3f} here: one over the layers that have a whole window."])


def main(arguments: Sequence[str]) -> None:
    """Decomposes, prints the correlations, writes them."""
    (options,) = flags.read([SpectrumOptions], "spectral_dynamics", arguments)
    analysis = run_spectrum(options, progress=bars)
    report = spectrum_report(analysis).write(analysis.out, analysis.run)
    everything = {name: tracked(result.scores, analysis.ks) for name, result in analysis.datasets.items()}
    model = {key: analysis.run["model"][key] for key in ("family", "num_layers", "width", "hash")}
    content = {
        "model": model,
        "k": list(analysis.ks),
        "window": options.window,
        "datasets": {
            name: {
                "num_samples": result.num_samples,
                "curves": {
                    key: result.scores[key].to_json() for key in (*REFERENCES, *(f"cca_{k}" for k in analysis.ks))
                },
                "correlations": {
                    key: {
                        "best": found.best,
                        "p_best": found.p_best,
                        **{curve: dataclasses.asdict(one) for curve, one in found.correlations.items()},
                    }
                    for key, found in everything[name].items()
                },
                "warnings": result.warnings,
            }
            for name, result in analysis.datasets.items()
        },
        "paper": {str(k): {"rho": rho, "p_shift": p} for k, (rho, p) in PAPER.items()},
    }
    write_json(analysis.out / "spectral_dynamics.json", "jaxcrit.spectral_dynamics", plain(content))
    print(told(content))
    print(f"report: {report}")


if __name__ == "__main__":
    leave(lambda: main(sys.argv[1:]))
