"""Similarity of layer activations: pure functions of arrays that know nothing of models, data or files."""

from jaxcrit.similarity.cka import Bias, cka, from_tables
from jaxcrit.similarity.grams import (
    DegenerateError,
    GramTables,
    Kernel,
    centred_grams,
    gram_tables,
    pack_upper,
    sweep,
    unpack_upper,
)
from jaxcrit.similarity.inference import (
    PermutationNull,
    cka_without_each,
    null_mean,
    null_variance,
    participation_ratio,
    permutation_null,
)
from jaxcrit.similarity.measures import knn, measure, procrustes, rsa, svcca, unit_rows
from jaxcrit.similarity.spectrum import Spectrum, canonical_correlations, cca, decompose, directions
from jaxcrit.similarity.units import cka_without_units

__all__ = [
    "Bias",
    "DegenerateError",
    "GramTables",
    "Kernel",
    "PermutationNull",
    "Spectrum",
    "canonical_correlations",
    "cca",
    "centred_grams",
    "cka",
    "cka_without_each",
    "cka_without_units",
    "decompose",
    "directions",
    "from_tables",
    "gram_tables",
    "knn",
    "measure",
    "null_mean",
    "null_variance",
    "pack_upper",
    "participation_ratio",
    "permutation_null",
    "procrustes",
    "rsa",
    "svcca",
    "sweep",
    "unit_rows",
    "unpack_upper",
]
