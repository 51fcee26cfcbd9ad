"""Scores any library's CKA against the float64 answers in benchmarks/conformance.npz (see make_conformance.py).

    python benchmarks/conformance.py                                       # jaxcrit, and the peers that are installed
    python benchmarks/conformance.py --call=module:function --variant="linear debiased"

``function(x, y)`` gets two float32 numpy arrays ``[n, d]``, ``[n, d']`` and returns a number. The peers are those
that install from PyPI (``pip install --no-deps pytorch-cka torch-cka ckatorch seaborn shesha-geometry`` beside torch).
Prints a table; without ``--call`` also writes benchmarks/results/conformance.json.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from environment import write_result

KIT = Path(__file__).parent / "conformance.npz"
GOOD = 1e-6
Function = Callable[[np.ndarray, np.ndarray], Any]


def jaxcrit() -> dict[str, tuple[str, Function]]:
    """Entry -> variant and function; the forms get both sides at one width, the narrower padded with zeros."""
    from jaxcrit.core.deletions import jackknife_stderr
    from jaxcrit.similarity import cka, cka_without_each, features, from_tables, null_mean, sweep, tiled

    def pair(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        width = max(x.shape[1], y.shape[1])
        return np.stack([np.pad(side, ((0, 0), (0, width - side.shape[1]))) for side in (x, y)])

    def stderr(x: np.ndarray, y: np.ndarray) -> float:
        deleted = cka_without_each(sweep(x[None], other=y[None]), "debiased")
        return jackknife_stderr(deleted[:, 0])[0]

    def direct(**options: Any) -> Function:
        return lambda x, y: cka(x[None], other=y[None], **options)[0, 0]

    def by_form(form: Callable[..., Any], **options: Any) -> Function:
        return lambda x, y: from_tables(form(pair(x, y), **options), "debiased")[0, 1]

    return {
        "cka": ("linear biased", direct()),
        "cka(bias='debiased')": ("linear debiased", direct(bias="debiased")),
        "tiled": ("linear debiased", by_form(tiled, tile=16)),
        "features": ("linear debiased", by_form(features, block=16)),
        "cka(kernel='rbf')": ("rbf biased", direct(kernel="rbf")),
        "cka(kernel='rbf', bias='debiased')": ("rbf debiased", direct(kernel="rbf", bias="debiased")),
        "tiled(kernel='rbf')": ("rbf debiased", by_form(tiled, tile=16, kernel="rbf")),
        "null_mean": ("null mean", lambda x, y: null_mean(sweep(x[None], other=y[None]))[0, 0]),
        "cka_without_each": ("jackknife", stderr),
    }


def pytorch_cka() -> dict[str, tuple[str, Function]]:
    import torch
    from cka import cka_from_features

    return {"cka_from_features": ("linear debiased", lambda x, y: cka_from_features(*map(torch.from_numpy, (x, y))))}


def torch_cka() -> dict[str, tuple[str, Function]]:
    import torch
    from torch_cka import CKA

    def compare(x: np.ndarray, y: np.ndarray) -> float:
        """What its loop does with one batch of all samples."""
        k, g = (torch.from_numpy(side @ side.T).fill_diagonal_(0) for side in (x, y))
        hsic = lambda a, b: CKA._HSIC(types.SimpleNamespace(device="cpu"), a, b)  # noqa: E731
        return hsic(k, g) / (np.sqrt(hsic(k, k)) * np.sqrt(hsic(g, g)))

    return {"CKA.compare, one batch": ("linear debiased", compare)}


def ckatorch() -> dict[str, tuple[str, Function]]:
    import torch
    from ckatorch import cka_base

    def entry(**options: Any) -> Function:
        return lambda x, y: cka_base(*map(torch.from_numpy, (x, y)), **options)

    return {
        "cka_base": ("linear biased", entry()),
        "cka_base(unbiased=True)": ("linear debiased", entry(unbiased=True)),
        "cka_base(kernel='rbf')": ("rbf biased", entry(kernel="rbf")),
        "cka_base(kernel='rbf', unbiased=True)": ("rbf debiased", entry(kernel="rbf", unbiased=True)),
    }


def shesha() -> dict[str, tuple[str, Function]]:
    from shesha.sim import cka

    return {
        "cka": ("linear biased", cka),
        "cka(debiased=True)": ("linear debiased", lambda x, y: cka(x, y, debiased=True)),
    }


LIBRARIES = {
    "jaxcrit": jaxcrit,
    "pytorch-cka": pytorch_cka,
    "torch-cka": torch_cka,
    "ckatorch": ckatorch,
    "shesha-geometry": shesha,
}


def score(kit: dict[str, np.ndarray], variant: str, function: Function) -> dict[str, Any]:
    """Errors by case; a library's own failure is its message."""
    errors: dict[str, float | str] = {}
    for case in json.loads(str(kit["meta"]))["cases"]:
        try:
            with np.errstate(all="ignore"):
                value = float(function(kit[f"{case}/x"], kit[f"{case}/y"]))
            errors[case] = abs(value - float(kit[f"{case}/{variant}"])) if np.isfinite(value) else "NaN"
        except Exception as error:  # whatever the library raises is its result
            errors[case] = f"{type(error).__name__}: {error}"[:80]
    good = sum(not isinstance(error, str) and error <= GOOD for error in errors.values())
    return {"variant": variant, "within_1e-6": good, "cases": len(errors), "errors": errors}


def line(name: str, entry: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    failed = {case: error for case, error in found["errors"].items() if isinstance(error, str)}
    numbers = {case: error for case, error in found["errors"].items() if case not in failed}
    worst = next(iter(failed), None) or max(numbers, key=numbers.__getitem__)
    error = found["errors"][worst]
    shown = (
        "fails" if isinstance(error, str) and error != "NaN" else error if isinstance(error, str) else f"{error:.0e}"
    )
    return f"{name:23} {entry:37} {found['variant']:16} {found['within_1e-6']:2}/{found['cases']} {shown:>6} {worst}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--call", help="module:function of (x, y)")
    parser.add_argument("--variant", help="which answers it is scored against")
    given = parser.parse_args()
    kit = dict(np.load(KIT))
    variants = json.loads(str(kit["meta"]))["variants"]
    if (given.call is None) != (given.variant is None) or (given.variant and given.variant not in variants):
        parser.error(f"give --call and --variant together; variants: {', '.join(variants)}")
    print(f"{'library':23} {'entry':37} {'variant':16} ≤1e-6  worst case")
    if given.call:
        module, _, name = given.call.partition(":")
        print(line(module, name, score(kit, given.variant, getattr(importlib.import_module(module), name))))
        return
    results = {}
    for library, entries in LIBRARIES.items():
        try:
            version = importlib.metadata.version(library) if library != "jaxcrit" else ""
            functions = entries()
        except ImportError as error:
            print(f"{library:23} not there ({error})")
            continue
        results[library] = {"version": version}
        for entry, (variant, function) in functions.items():
            found = results[library][entry] = score(kit, variant, function)
            print(line(f"{library} {version}".strip(), entry, found), flush=True)
    print(f"written: {write_result('conformance', {'tolerance': GOOD, 'libraries': results})}")


if __name__ == "__main__":
    main()
