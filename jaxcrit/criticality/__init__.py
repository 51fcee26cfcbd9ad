"""Criteria that score layers, and the choice of layers by a score."""

from jaxcrit.criticality.agreement import overlap_matrix, spearman_matrix
from jaxcrit.criticality.delta import delta
from jaxcrit.criticality.score import CRITERIA, layer_scores, values_without_each
from jaxcrit.criticality.selection import choose, mean_rank, selection_probability
from jaxcrit.criticality.step import step

__all__ = [
    "CRITERIA",
    "choose",
    "delta",
    "layer_scores",
    "mean_rank",
    "overlap_matrix",
    "selection_probability",
    "spearman_matrix",
    "step",
    "values_without_each",
]
