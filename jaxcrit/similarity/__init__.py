"""Similarity of layer activations: pure functions of arrays that know nothing of models, data or files."""

from jaxcrit.similarity.cka import Bias, cka, from_tables
from jaxcrit.similarity.features import FeatureSums, features
from jaxcrit.similarity.forms import Form, choose_form
from jaxcrit.similarity.grams import (
    DegenerateError,
    GramSums,
    GramTables,
    Kernel,
    Tables,
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
from jaxcrit.similarity.sharded import shard, sharded
from jaxcrit.similarity.spectrum import Spectrum, canonical_correlations, cca, decompose, directions
from jaxcrit.similarity.tiled import sampled_bandwidths, tiled
from jaxcrit.similarity.units import cka_without_units

__all__ = [
    "Bias",
    "DegenerateError",
    "FeatureSums",
    "Form",
    "GramSums",
    "GramTables",
    "Kernel",
    "PermutationNull",
    "Spectrum",
    "Tables",
    "canonical_correlations",
    "cca",
    "centred_grams",
    "choose_form",
    "cka",
    "cka_without_each",
    "cka_without_units",
    "decompose",
    "directions",
    "features",
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
    "sampled_bandwidths",
    "shard",
    "sharded",
    "svcca",
    "sweep",
    "tiled",
    "unit_rows",
    "unpack_upper",
]
