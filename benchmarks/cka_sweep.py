"""Time of the CKA sweep over all pairs of layers, beside what a user would run instead.

    python benchmarks/cka_sweep.py

One process, one thread and one core for everyone, the contenders in turn, the least of the repeats (of wall and of
processor time; on a busy machine the second is the steadier). Contenders, on the same float32 activations:

- ``jaxcrit``: the library's call, checks for degenerate data and transfer to the host included, compile not.
- ``numpy gram-once``: the shortest numpy that builds each Gram once (BLAS computes half of X X'; XLA cannot).
- ``paper, float32``: the paper's algorithm, for each of the L^2 ordered pairs three HSIC of raw Grams and H K H; a few
  pairs are timed and multiplied up.
- ``paper, as written``: the same with numpy's float64 identity and ones in H, which make the centring products float64.

Errors are against float64, on the same activations. Prints a table; writes benchmarks/results/cka_sweep.json.
"""

# ruff: noqa: E402  (threads are set before anything that starts them)
import os

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
for library in ("OPENBLAS", "OMP", "MKL"):
    os.environ[f"{library}_NUM_THREADS"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import time

import jax
import numpy as np
from absl import app, flags
from cka_rows import activations, gram_once
from environment import write_result

from jaxcrit.criteria.delta import layer_scores
from jaxcrit.similarity import cka, sweep

LAYERS = flags.DEFINE_integer("layers", 32, "number of layers, L")
SAMPLES = flags.DEFINE_integer("samples", 300, "number of samples, N")
WIDTH = flags.DEFINE_integer("width", 4096, "width, D")
REPEATS = flags.DEFINE_integer("repeats", 10, "rounds over all contenders")
PAIRS = flags.DEFINE_integer("pairs", 4, "pairs of layers timed in each round of the paper's algorithm")


def paper_pair(x, y, dtype):
    """The paper's CKA of one ordered pair; ``dtype`` is that of H."""

    def hsic(a, b):
        count = len(a)
        h = np.eye(count, dtype=dtype) - np.ones((count, count), dtype) / count
        return np.sum((h @ (a @ a.T) @ h) * (h @ (b @ b.T) @ h))

    return hsic(x, y) / (np.sqrt(hsic(x, x)) * np.sqrt(hsic(y, y)))


def paper_pairs(hidden, dtype, count):
    """CKA of layer 0 with ``count`` others."""
    return np.array([paper_pair(hidden[0], hidden[1 + k % (len(hidden) - 1)], dtype) for k in range(count)])


def main(_):
    layers, samples, width = LAYERS.value, SAMPLES.value, WIDTH.value
    hidden = activations(layers, samples, width)
    on_device = jax.device_put(hidden)
    exact = gram_once(hidden.astype(np.float64))
    some = exact[0, 1 + np.arange(PAIRS.value) % (layers - 1)]
    share = layers * layers / PAIRS.value
    contenders = {
        "jaxcrit cka, biased": (lambda: cka(on_device), exact, 1),
        "jaxcrit cka, debiased": (lambda: cka(on_device, bias="debiased"), None, 1),
        "jaxcrit 4 scores with stderr": (lambda: layer_scores(sweep(on_device)), None, 1),
        "jaxcrit cka, rbf": (lambda: cka(on_device, kernel="rbf"), None, 1),
        "numpy gram-once, biased": (lambda: gram_once(hidden), exact, 1),
        "paper, float32": (lambda: paper_pairs(hidden, np.float32, PAIRS.value), some, share),
        "paper, as written": (lambda: paper_pairs(hidden, np.float64, PAIRS.value), some, share),
    }
    wall, processor, error = {}, {}, {}
    for name, (call, truth, _) in contenders.items():  # compiles, and warms caches
        result = call()
        error[name] = None if truth is None else float(np.abs(np.asarray(result, np.float64) - truth).max())
    for _ in range(REPEATS.value):
        for name, (call, _, factor) in contenders.items():
            start, start_processor = time.perf_counter(), time.process_time()
            call()
            spent_processor, spent = time.process_time() - start_processor, time.perf_counter() - start
            wall[name] = min(wall.get(name, np.inf), spent * factor)
            processor[name] = min(processor.get(name, np.inf), spent_processor * factor)

    ours = "jaxcrit cka, biased"
    print(f"L={layers} N={samples} D={width}, one thread, least of {REPEATS.value} rounds")
    print(f"{'':30} {'wall s':>9} {'cpu s':>9} {'x ours':>8} {'(cpu)':>8}  max error")
    for name in contenders:
        shown = "" if error[name] is None else f"{error[name]:.1e}"
        ratios = f"{wall[name] / wall[ours]:8.2f} {processor[name] / processor[ours]:8.2f}"
        print(f"{name:30} {wall[name]:9.3f} {processor[name]:9.3f} {ratios}  {shown}")
    print(f"paper: {PAIRS.value} pairs a round, multiplied by {share:g} to all {layers * layers} ordered pairs")
    figures = {
        "shape": {"layers": layers, "samples": samples, "width": width},
        "threads": 1,
        "rounds": REPEATS.value,
        "paper_pairs_timed_per_round": PAIRS.value,
        "seconds_wall": wall,
        "seconds_processor": processor,
        "times_ours_wall": {name: wall[name] / wall[ours] for name in contenders},
        "times_ours_processor": {name: processor[name] / processor[ours] for name in contenders},
        "max_error": error,
        "numpy_blas": np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"],
    }
    print(f"written: {write_result('cka_sweep', figures)}")


if __name__ == "__main__":
    app.run(main)
