"""Whether the error bars are right: intervals, the null and the confidence set on data whose truth is known.

    python benchmarks/coverage.py

Layers are a Gaussian chain, x_{l+1} = r x_l + sqrt(1 - r^2) z, of which all have the same spectrum, so that the true
CKA of neighbours is r^2 exactly: 0.95^2, but at the planted layer. Eigenvalues fall as k^-power.

- ``interval``: how often debiased CKA ± t standard errors of the jackknife (Student, N-1 degrees of freedom) holds the
  truth, over all neighbours and at the planted pair; target 91 to 99 %. Apart from it flat spectra (more directions, by
  the participation ratio, than the fewest samples) and independent layers, where the jackknife is known to be too wide.
- ``null``: how often p < 5 % for independent layers; target 4 to 7 %. The normal distribution beside it.
- ``confidence_set``: how often the set holds the planted layer, by step and by δ, and how many of the 8 candidates it
  holds; target 95 % or more. Without a planted layer it should hold about all of them.
- ``mean_ranks``: the same set for several datasets, which choose by mean rank: three of different spectra and levels
  (neighbours apart from the planted pair differ too), 60 or 300 prompts each, the layer planted in all, in two of the
  three, or in none. All differences are bounded at once, so it should be wider than needed.
- ``sample_size``: the predicted share of draws of 4 N that make the choice of N, beside that of fresh chains of 4 N.

One core for each part. Prints tables; writes benchmarks/results/coverage.json.
"""

# ruff: noqa: E402  (threads are set before anything that starts them)
import os

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
for library in ("OPENBLAS", "OMP", "MKL"):
    os.environ[f"{library}_NUM_THREADS"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import concurrent.futures
import multiprocessing
import time

import numpy as np
from absl import app, flags
from environment import write_result
from scipy.stats import norm, t

from jaxcrit.criteria.delta import deletions, jackknife_stderr, layer_scores, values_without_each
from jaxcrit.selection import confidence_set, sample_sizes
from jaxcrit.similarity import cka_without_each, from_tables, permutation_null, sweep

RUNS = flags.DEFINE_integer("runs", 1000, "chains of each setting")
SEED = flags.DEFINE_integer("seed", 0, "of everything")
PROCESSES = flags.DEFINE_integer("processes", 1, "parts run at a time")

LAYERS, WIDTH, KEEP, JUMP, SMALL_JUMP = 12, 100, 0.95, 0.9, 0.93
LEVEL = 0.95
SIZES = (60, 150, 300)


def chain(rng, samples, power, *, layers=LAYERS, jump=JUMP, keep=KEEP):
    """``[L, N, D]`` float32; neighbours have a CKA of keep^2, but jump^2 at the planted layer (jump None: as all)."""
    scale = np.arange(1, WIDTH + 1, dtype=np.float32) ** (-power / 2)
    hidden = rng.standard_normal((layers, samples, WIDTH), dtype=np.float32)
    for layer in range(1, layers):
        r = jump if layer == layers // 2 and jump is not None else keep
        hidden[layer] = r * hidden[layer - 1] + np.sqrt(1 - r * r) * hidden[layer]
    return hidden * scale


def directions(power):
    """Participation ratio of the spectrum."""
    eigenvalues = np.arange(1, WIDTH + 1) ** -float(power)
    return eigenvalues.sum() ** 2 / (eigenvalues**2).sum()


def held(hidden, pairs, truth):
    """Whether the interval of each pair holds its truth, and how wide it is."""
    tables = sweep(hidden)
    rows, columns = pairs
    values = from_tables(tables, "debiased")[rows, columns]
    error = jackknife_stderr(cka_without_each(tables, "debiased")[:, rows, columns])
    half = t.ppf((1 + LEVEL) / 2, hidden.shape[1] - 1) * error
    return np.abs(values - truth) <= half, values, error


def interval(rng, runs):
    """Coverage by spectrum and N."""
    layers = 6
    neighbours = np.arange(layers - 1), np.arange(1, layers)
    planted = layers // 2 - 1
    truth = np.full(layers - 1, KEEP**2)
    truth[planted] = JUMP**2
    rows = []
    for power in (0.0, 0.5, 1.0, 1.5, 2.0):
        for samples in SIZES:
            drawn = [held(chain(rng, samples, power, layers=layers), neighbours, truth) for _ in range(runs)]
            inside, values, errors = (np.array(part) for part in zip(*drawn, strict=True))
            rows.append(
                {
                    "power": power,
                    "samples": samples,
                    "neighbours": inside.mean(),
                    "planted": inside[:, planted].mean(),
                    "stderr_over_spread": np.median(errors.mean(axis=0) / values.std(axis=0, ddof=1)),
                    "flat": bool(directions(power) > min(SIZES)),
                }
            )
    apart = np.arange(0, 6, 2), np.arange(1, 6, 2)
    for power in (0.0, 1.0):
        drawn = [held(chain(rng, 60, power, layers=6, keep=0.0, jump=None), apart, 0) for _ in range(runs)]
        rows.append({"power": power, "samples": 60, "independent": np.mean([inside for inside, _, _ in drawn])})
    return rows


def null(rng, runs):
    """Type-I error at 5 % for disjoint pairs of independent layers, three a draw."""
    left, right = np.arange(0, 6, 2), np.arange(1, 6, 2)
    rows = []
    for power in (0.0, 0.5, 1.0, 1.5, 2.0):
        for samples in (20, 60):
            p, z = [], []
            for _ in range(-(-5 * runs // 3)):
                tested = permutation_null(sweep(chain(rng, samples, power, layers=6, keep=0.0, jump=None)))
                p.append(tested.p[left, right])
                z.append(tested.score[left, right])
            shares = {"type_1": np.mean(np.array(p) < 0.05), "normal": np.mean(np.array(z) > norm.isf(0.05))}
            rows.append({"power": power, "samples": samples, "draws": np.size(p), **shares})
    return rows


def confidence(rng, runs):
    """Coverage and size of the set."""
    rows = []
    for jump in (JUMP, SMALL_JUMP, None):
        for samples in (60, 150):
            sets = {"step_debiased": [], "delta_debiased": []}
            for _ in range(runs):
                tables = sweep(chain(rng, samples, 1.0, jump=jump))
                without = deletions(tables)
                scores = layer_scores(tables, without=without)
                for key, found in sets.items():
                    left = values_without_each(tables, key, without=without)
                    found.append(confidence_set([scores[key]], [left], draws=1000))
            for key, found in sets.items():
                share, size = np.mean([LAYERS // 2 in one for one in found]), np.mean([len(one) for one in found])
                rows.append({"score": key, "jump": jump, "samples": samples, "holds": share, "layers": size})
    return rows


def mean_ranks(rng, runs):
    """Coverage and size of the set of the layer of lowest mean rank."""
    rows, datasets = [], ((0.5, KEEP), (1.0, 0.96), (1.5, 0.94))
    for jump, planted, samples in ((0.8, 3, 60), (0.8, 2, 60), (JUMP, 3, 60), (JUMP, 3, 300), (None, 0, 60)):
        sets = {"step_debiased": [], "delta_debiased": []}
        for _ in range(runs):
            scores, left = {key: [] for key in sets}, {key: [] for key in sets}
            for k, (power, keep) in enumerate(datasets):
                tables = sweep(chain(rng, samples, power, jump=jump if k < planted else None, keep=keep))
                without = deletions(tables, reach=2)
                found = layer_scores(tables, without=without)
                for key in sets:
                    scores[key].append(found[key])
                    left[key].append(values_without_each(tables, key, without=without))
            for key, kept in sets.items():
                kept.append(confidence_set(scores[key], left[key], draws=500))
        for key, kept in sets.items():
            share, size = np.mean([LAYERS // 2 in one for one in kept]), np.mean([len(one) for one in kept])
            row = {"score": key, "jump": jump, "planted_in": planted, "samples": samples}
            rows.append({**row, "holds": share, "layers": size})
    return rows


def sample_size(rng, runs):
    """Predicted and actual share of choices that agree with this one, at 4 N."""
    rows, samples = [], 60
    for jump in (JUMP, SMALL_JUMP, None):
        predicted, actual = [], []
        for _ in range(runs):
            tables = sweep(chain(rng, samples, 1.0, jump=jump))
            score, left = layer_scores(tables)["step_debiased"], values_without_each(tables, "step_debiased")
            curve = sample_sizes([score], [left], 1, draws=500)
            predicted.append(curve.same[list(curve.num_prompts).index(4 * samples)])
            chosen = score.ranking()
            chosen = chosen[(chosen >= 2) & (chosen < LAYERS - 2)][0]
            fresh = from_tables(sweep(chain(rng, 4 * samples, 1.0, jump=jump)), "debiased").diagonal(offset=1)
            actual.append(2 + fresh[1 : LAYERS - 3].argmin() == chosen)
        rows.append({"jump": jump, "samples": samples, "predicted": np.mean(predicted), "actual": np.mean(actual)})
    return rows


KNOWN = {
    "interval": interval,
    "null": null,
    "confidence_set": confidence,
    "sample_size": sample_size,
    "mean_ranks": mean_ranks,
}


def measured(part, seed, runs):
    """Rows of one part, and its processor time."""
    start = time.process_time()
    rows = KNOWN[part](np.random.default_rng([seed, list(KNOWN).index(part)]), runs)
    plain = [{k: v.item() if isinstance(v, np.generic) else v for k, v in row.items()} for row in rows]
    return plain, round(time.process_time() - start, 1)


def show(name, rows):
    """Prints a table of what was measured."""
    print(f"\n{name}")
    for row in rows:
        print("  " + "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


def main(_):
    figures = {"seed": SEED.value, "runs": RUNS.value, "layers": LAYERS, "width": WIDTH, "processor_seconds": {}}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(PROCESSES.value, mp_context=spawn) as pool:
        waiting = {part: pool.submit(measured, part, SEED.value, RUNS.value) for part in KNOWN}
        for part, result in waiting.items():
            figures[part], figures["processor_seconds"][part] = result.result()
            show(f"{part} ({figures['processor_seconds'][part]} s)", figures[part])
    print(f"written: {write_result('coverage', figures)}")


if __name__ == "__main__":
    app.run(main)
