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
from jaxcrit.similarity.inference import cka_without_each, null_mean, participation_ratio

__all__ = [
    "Bias",
    "DegenerateError",
    "GramTables",
    "Kernel",
    "centred_grams",
    "cka",
    "cka_without_each",
    "from_tables",
    "gram_tables",
    "null_mean",
    "pack_upper",
    "participation_ratio",
    "sweep",
    "unpack_upper",
]
