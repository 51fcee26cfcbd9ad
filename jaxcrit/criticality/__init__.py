"""Criteria that score layers, the choice of layers by a score, how sure it is, and whether two scores agree."""

from jaxcrit.criticality.confidence import Certainty, SampleSizes, certainty, confidence_set, sample_sizes
from jaxcrit.criticality.correlation import correlate, overlap_matrix, spearman_matrix
from jaxcrit.criticality.delta import delta
from jaxcrit.criticality.leverage import Leverage, leverage
from jaxcrit.criticality.selection import choose, mean_rank, selection_probability
from jaxcrit.criticality.step import step

__all__ = [
    "Certainty",
    "Leverage",
    "SampleSizes",
    "certainty",
    "choose",
    "confidence_set",
    "correlate",
    "delta",
    "leverage",
    "mean_rank",
    "overlap_matrix",
    "sample_sizes",
    "selection_probability",
    "spearman_matrix",
    "step",
]
