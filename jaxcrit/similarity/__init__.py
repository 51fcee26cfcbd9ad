"""Similarity of layer activations: pure functions of arrays that know nothing of models, data or files."""

from jaxcrit.similarity._cka import Bias, cka, from_tables, hsic
from jaxcrit.similarity._components import Components, principal_components
from jaxcrit.similarity._features import FeatureSums, features, product_sharding
from jaxcrit.similarity._forms import FORMS, KEPT_SAMPLES, RESIDENT_SAMPLES, Form, choose_form
from jaxcrit.similarity._grams import (
    KERNELS,
    DegenerateError,
    GramSums,
    GramTables,
    Kernel,
    PackedGrams,
    Tables,
    centred_grams,
    gram_tables,
    pack_upper,
    sweep,
)
from jaxcrit.similarity._inference import (
    PermutationNull,
    cka_without_each,
    null_mean,
    null_variance,
    participation_ratio,
    permutation_null,
)
from jaxcrit.similarity._measures import MEASURES, knn, measure, parse_measures, procrustes, rsa, svcca, unit_rows
from jaxcrit.similarity._sharded import shard, sharded
from jaxcrit.similarity._spectrum import (
    Spectrum,
    canonical_correlations,
    cca,
    cca_without_each,
    decompose,
    directions,
    effective_rank,
)
from jaxcrit.similarity._tiled import Layers, sampled_bandwidths, tiled
from jaxcrit.similarity._units import MIN_SAMPLES, MIN_UNITS, cka_without_units

__all__ = [
    "FORMS",
    "KEPT_SAMPLES",
    "KERNELS",
    "MEASURES",
    "MIN_SAMPLES",
    "MIN_UNITS",
    "RESIDENT_SAMPLES",
    "Bias",
    "Components",
    "DegenerateError",
    "FeatureSums",
    "Form",
    "GramSums",
    "GramTables",
    "Kernel",
    "Layers",
    "PackedGrams",
    "PermutationNull",
    "Spectrum",
    "Tables",
    "canonical_correlations",
    "cca",
    "cca_without_each",
    "centred_grams",
    "choose_form",
    "cka",
    "cka_without_each",
    "cka_without_units",
    "decompose",
    "directions",
    "effective_rank",
    "features",
    "from_tables",
    "gram_tables",
    "hsic",
    "knn",
    "measure",
    "null_mean",
    "null_variance",
    "pack_upper",
    "parse_measures",
    "participation_ratio",
    "permutation_null",
    "principal_components",
    "procrustes",
    "product_sharding",
    "rsa",
    "sampled_bandwidths",
    "shard",
    "sharded",
    "svcca",
    "sweep",
    "tiled",
    "unit_rows",
]
