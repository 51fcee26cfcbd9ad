"""Makes benchmarks/conformance.npz: pairs of activations and the float64 answers of every variant of CKA.

Everything is straight from the formulas, in float64, on inputs that are float32 already; nothing is jaxcrit's.
Entries are ``CASE/x`` and ``CASE/y`` ``[n, d]`` float32, and ``CASE/VARIANT`` a number; ``meta`` says what each is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

KIT = Path(__file__).parent / "conformance.npz"
BATCH = 16
CASES = {
    "plain": "40 samples of width 64, related",
    "narrow": "60 samples of width 8",
    "wide, unrelated": "40 samples of width 256, unrelated: biased CKA is 0.86 all the same",
    "unequal widths": "40 samples of widths 64 and 20",
    "scaled": "plain, times 1e-3 and 1e3",
    "shifted": "plain, plus a constant vector of length about 80",
    "mean 30": "plain with two dimensions of mean 30, standard deviation 3",
    "mean 100": "... 100 and 3",
    "mean 500": "... 500 and 5",
    "mean 2000": "... 2000 and 10",
    "far sample": "plain with one sample ten times as long",
}
VARIANTS = {
    "linear biased": "Kornblith et al. 2019: <HKH, HLH> / (|HKH| |HLH|)",
    "linear debiased": "HSIC_1 of Song et al. 2012, Eq. 5, in place of <HKH, HLH>",
    "linear debiased, batches": f"sums of HSIC_1 over batches of {BATCH} in order, the last shorter, then the ratio",
    "rbf biased": "exp(-d2 / (2 m)), m the lower median of the non-zero squared distances between samples",
    "rbf debiased": "the same with HSIC_1",
    "null mean": "of linear biased over all permutations: tr tr' / ((n - 1) |HKH| |HLH|)",
    "jackknife": "delete-1 standard error of linear debiased: sqrt((n - 1) / n sum (left - mean)^2)",
}


def inputs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Case -> x and y, float32."""
    rng = np.random.default_rng(0)

    def related(samples: int, width: int, other: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        x = rng.standard_normal((samples, width)) * np.arange(1, width + 1) ** -0.3
        own = rng.standard_normal((samples, other or width))
        return x, 0.8 * x[:, : other or width] + 0.4 * own

    def outliers(mean: float, deviation: float) -> tuple[np.ndarray, np.ndarray]:
        shared = rng.standard_normal((len(plain[0]), 2))
        pair = tuple(side.copy() for side in plain)
        for side in pair:
            side[:, :2] = mean + deviation * (0.9 * shared + 0.44 * rng.standard_normal(shared.shape))
        return pair

    plain = related(40, 64)
    far = tuple(side * np.where(np.arange(40) == 7, 10, 1)[:, None] for side in plain)
    cases = {
        "plain": plain,
        "narrow": related(60, 8),
        "wide, unrelated": (rng.standard_normal((40, 256)), rng.standard_normal((40, 256))),
        "unequal widths": related(40, 64, 20),
        "scaled": (plain[0] * 1e-3, plain[1] * 1e3),
        "shifted": tuple(side + 10 * rng.standard_normal(64) for side in plain),
        "mean 30": outliers(30, 3),
        "mean 100": outliers(100, 3),
        "mean 500": outliers(500, 5),
        "mean 2000": outliers(2000, 10),
        "far sample": far,
    }
    return {name: (x.astype(np.float32), y.astype(np.float32)) for name, (x, y) in cases.items()}


def linear(x: np.ndarray) -> np.ndarray:
    """Linear Gram of float64 features, centred first."""
    x = x - x.mean(axis=0)
    return x @ x.T


def rbf(x: np.ndarray) -> np.ndarray:
    """RBF Gram with the median bandwidth."""
    squares = np.square(x[:, None, :] - x[None, :, :]).sum(axis=2)
    pairs = np.sort(squares[np.triu_indices(len(x), 1)])
    pairs = pairs[pairs > 0]
    return np.exp(-squares / (2 * pairs[(len(pairs) - 1) // 2]))


def hsic_0(k: np.ndarray, g: np.ndarray) -> float:
    """Biased, up to a factor."""
    h = np.eye(len(k)) - 1 / len(k)
    return float(np.sum((h @ k @ h) * (h @ g @ h)))


def hsic_1(k: np.ndarray, g: np.ndarray) -> float:
    """Song et al. 2012, Eq. 5."""
    n = len(k)
    k, g = k - np.diag(np.diag(k)), g - np.diag(np.diag(g))
    middle = k.sum() * g.sum() / ((n - 1) * (n - 2))
    return float((np.sum(k * g) + middle - 2 / (n - 2) * (k.sum(axis=0) @ g.sum(axis=0))) / (n * (n - 3)))


def ratio(product: Callable[[np.ndarray, np.ndarray], float], k: np.ndarray, g: np.ndarray) -> float:
    """CKA by one of the products."""
    return product(k, g) / np.sqrt(product(k, k) * product(g, g))


def answers(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Variant -> number."""
    k, g, n = linear(x), linear(y), len(x)
    parts = [(linear(x[s : s + BATCH]), linear(y[s : s + BATCH])) for s in range(0, n, BATCH)]
    sums = [sum(hsic_1(*pair) for pair in of) for of in (parts, [(a, a) for a, _ in parts], [(b, b) for _, b in parts])]
    left = [ratio(hsic_1, linear(np.delete(x, m, 0)), linear(np.delete(y, m, 0))) for m in range(n)]
    return {
        "linear biased": ratio(hsic_0, k, g),
        "linear debiased": ratio(hsic_1, k, g),
        "linear debiased, batches": sums[0] / np.sqrt(sums[1] * sums[2]),
        "rbf biased": ratio(hsic_0, rbf(x), rbf(y)),
        "rbf debiased": ratio(hsic_1, rbf(x), rbf(y)),
        "null mean": np.trace(k) * np.trace(g) / ((n - 1) * np.linalg.norm(k) * np.linalg.norm(g)),
        "jackknife": np.sqrt((n - 1) * np.var(left)),
    }


def main() -> None:
    entries: dict[str, np.ndarray] = {}
    for name, (x, y) in inputs().items():
        entries |= {f"{name}/x": x, f"{name}/y": y}
        found = answers(x.astype(np.float64), y.astype(np.float64))
        entries |= {f"{name}/{variant}": np.float64(value) for variant, value in found.items()}
    meta = {"format": "jaxcrit.conformance", "format_version": 1, "cases": CASES, "variants": VARIANTS, "batch": BATCH}
    np.savez_compressed(KIT, meta=json.dumps(meta), **entries)
    print(f"{KIT.name}: {len(CASES)} cases, {len(VARIANTS)} variants, {KIT.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
