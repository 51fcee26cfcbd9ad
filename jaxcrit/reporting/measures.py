"""δ by other measures than CKA, beside δ."""

from __future__ import annotations

from collections.abc import Mapping

from jaxcrit.core.layers import LayerScores
from jaxcrit.reporting.tables import number, table
from jaxcrit.selection.correlation import spearman


def measures_table(scores: Mapping[str, LayerScores]) -> str:
    """One row per layer, one column per measure of ``--measures``; below, how each ranks the layers beside δ.

    Args:
        scores: ``delta_debiased``, and ``delta_NAME`` with ``measure`` in its meta.

    Returns:
        The table, empty where there are no such scores.
    """
    others = {score.meta["measure"]: score for score in scores.values() if "measure" in score.meta}
    if not others:
        return ""
    columns = {"δ debiased": scores["delta_debiased"], **others}
    rows = [
        [str(layer), *(number(score.values[layer]) for score in columns.values()), ""]
        for layer in range(scores["delta_debiased"].num_layers)
    ]
    rhos = [spearman(scores["delta_debiased"].values, score.values) for score in columns.values()]
    rows.append(["ρ", *(number(rho, 2) for rho in rhos), "Spearman's with δ debiased"])
    return table(["layer", *columns, ""], rows)
