"""The choice of layers by a score, how sure it is, and whether two scores agree: pure functions of scores."""

from jaxcrit.selection.choice import choose, mean_rank, selection_probability
from jaxcrit.selection.confidence import Certainty, SampleSizes, certainty, confidence_set, sample_sizes
from jaxcrit.selection.correlation import correlate, overlap_matrix, spearman_matrix
from jaxcrit.selection.leverage import Leverage, leverage

__all__ = [
    "Certainty",
    "Leverage",
    "SampleSizes",
    "certainty",
    "choose",
    "confidence_set",
    "correlate",
    "leverage",
    "mean_rank",
    "overlap_matrix",
    "sample_sizes",
    "selection_probability",
    "spearman_matrix",
]
