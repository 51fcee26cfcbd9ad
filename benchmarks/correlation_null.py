"""How often each p calls unrelated scores significant: ``python benchmarks/correlation_null.py [--draws=1000]``.

Two independent series of L layers, each smooth over depth in the same way: noise averaged over a window of 5 (as δ and
a window's substitution loss are), a first-order autoregression, or a random walk. No p should be below 0.05 in more
than 5 % of the draws (a shift's p is a multiple of 1/L, so the target is the multiple below).
"""

import argparse
import math
from collections.abc import Callable

import numpy as np
from environment import write_result
from scipy.signal import lfilter
from scipy.stats import kstest

from jaxcrit.selection.correlation import block_permutation_p, circular_shift_p, naive_p, partial_given_depth

LAYERS = (16, 28, 32, 80)
WINDOW = 5
LEVEL = 0.05


def averaged(rng: np.random.Generator, layers: int) -> np.ndarray:
    """White noise averaged over a window."""
    return np.convolve(rng.standard_normal(layers + WINDOW - 1), np.ones(WINDOW) / WINDOW, "valid")


def autoregression(rng: np.random.Generator, layers: int) -> np.ndarray:
    """Each layer 0.9 of the one before, and noise; from the stationary state."""
    return lfilter([1], [1, -0.9], rng.standard_normal(layers + 200))[200:]


def walk(rng: np.random.Generator, layers: int) -> np.ndarray:
    """A sum of noise: no two stretches of it are alike, which no shift can put right."""
    return np.cumsum(rng.standard_normal(layers))


NULLS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "window of 5": averaged,
    "autoregression 0.9": autoregression,
    "random walk": walk,
}


def rates(null: Callable[[np.random.Generator, int], np.ndarray], layers: int, draws: int, seed: int) -> dict:
    """Share of draws at or below 0.05 for every p, and whether the shift's is uniform (Kolmogorov-Smirnov)."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        x, y = null(rng, layers), null(rng, layers)
        found.append(
            (
                naive_p(x, y),
                circular_shift_p(x, y),
                block_permutation_p(x, y, 2 * WINDOW, draws=499),
                block_permutation_p(x, y, WINDOW, draws=499),
                partial_given_depth(x, y)[1],
            )
        )
    columns = np.array(found).T
    names = ("naive", "shift", "blocks of two windows", "blocks of one window", "shift, given depth")
    shares = {name: float(np.mean(column <= LEVEL)) for name, column in zip(names, columns, strict=True)}
    spread = columns[1] - rng.random(draws) / layers  # between the multiples of 1/L, for a continuous law
    uniform = float(kstest(spread, "uniform").pvalue)
    return {**shares, "shift target": math.floor(LEVEL * layers) / layers, "shift uniform, p": uniform}


def main() -> None:
    """Draws, prints a line each, writes results/correlation_null.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=1000)
    arguments = parser.parse_args()
    figures = {}
    for name, null in NULLS.items():
        for layers in LAYERS:
            key = f"{name}, {layers} layers"
            figures[key] = rates(null, layers, arguments.draws, seed=layers)
            print(f"{key}: " + ", ".join(f"{what} {value:.3f}" for what, value in figures[key].items()))
    print(write_result("correlation_null", {"level": LEVEL, "draws": arguments.draws, "rates": figures}).name)


if __name__ == "__main__":
    main()
