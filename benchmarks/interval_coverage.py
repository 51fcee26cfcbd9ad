"""How often the 95 % intervals of `jaxcrit.evaluation.intervals` hold: ``python benchmarks/interval_coverage.py``.

Wilson: binomial draws at shares from 0.01 to 0.99. Two-level bootstrap: success of seeds on prompts, with a spread of
either, both, or none; Student's interval over the same seeds and Wilson's of all answers stand beside it.
"""

from __future__ import annotations

import argparse

import numpy as np
from environment import write_result

from jaxcrit.evaluation.intervals import t_interval, two_level_bootstrap, wilson

SPREADS = {"none": (0.0, 0.0), "prompts": (0.0, 1.5), "seeds": (0.8, 0.0), "both": (0.8, 1.5)}


def coverage_of_wilson(n: int, rounds: int, rng: np.random.Generator) -> dict[str, float]:
    """Mean and least coverage over shares."""
    low, high = np.array([wilson(k, n) for k in range(n + 1)]).T
    shares = np.linspace(0.01, 0.99, 99)
    drawn = rng.binomial(n, shares, (rounds, len(shares)))
    covers = ((low[drawn] <= shares) & (shares <= high[drawn])).mean(axis=0)
    return {"mean": round(float(covers.mean()), 4), "least": round(float(covers.min()), 4)}


def coverage_of_seeds(
    seeds: int, prompts: int, spread: tuple[float, float], rounds: int, rng: np.random.Generator
) -> dict[str, float]:
    """Coverage of three intervals for the success of a new seed on a new prompt, in log-odds around 0."""
    held = dict.fromkeys(("two_level_bootstrap", "student_over_seeds", "wilson_of_all"), 0)
    for number in range(rounds):
        odds = spread[0] * rng.normal(size=(seeds, 1)) + spread[1] * rng.normal(size=prompts)
        outcomes = (rng.random((seeds, prompts)) < 1 / (1 + np.exp(-odds))).astype(float)
        intervals = {
            "two_level_bootstrap": two_level_bootstrap(outcomes, draws=2000, seed=number),
            "student_over_seeds": t_interval(outcomes.mean(axis=1)),
            "wilson_of_all": wilson(int(outcomes.sum()), outcomes.size),
        }
        for name, (low, high) in intervals.items():
            held[name] += low <= 0.5 <= high  # by symmetry the truth is one half, whatever the spread
    return {name: round(count / rounds, 4) for name, count in held.items()}


def main() -> None:
    """Simulates, prints, writes results/interval_coverage.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    rounds = parser.parse_args().rounds
    rng = np.random.default_rng(0)
    figures: dict[str, dict[str, dict[str, float]]] = {"wilson": {}, "seeds": {}}
    for n in (30, 100, 300):
        figures["wilson"][f"n={n}"] = coverage_of_wilson(n, rounds, rng)
    for name, spread in SPREADS.items():
        for seeds in (3, 5):
            figures["seeds"][f"{seeds} seeds x 100 prompts, spread of {name}"] = coverage_of_seeds(
                seeds, 100, spread, rounds, rng
            )
    for kind, rows in figures.items():
        for name, row in rows.items():
            print(f"{kind:<8}{name:<40}" + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    write_result("interval_coverage", {"rounds": rounds, "level": 0.95, **figures})


if __name__ == "__main__":
    main()
