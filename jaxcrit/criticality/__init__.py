"""Criteria that score layers, the choice of layers by a score, and whether two scores agree."""

from jaxcrit.criticality.correlation import correlate, overlap_matrix, spearman_matrix
from jaxcrit.criticality.delta import delta
from jaxcrit.criticality.selection import choose, mean_rank, selection_probability
from jaxcrit.criticality.step import step

__all__ = [
    "choose",
    "correlate",
    "delta",
    "mean_rank",
    "overlap_matrix",
    "selection_probability",
    "spearman_matrix",
    "step",
]
