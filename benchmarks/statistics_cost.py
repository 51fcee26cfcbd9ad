"""What the statistics of a sweep cost beside the bare sweep.

    python benchmarks/statistics_cost.py

One thread and one core, the two in turn, the least of the rounds. Bare: Grams, the check for degenerate data that both
make, one product of all Grams, biased CKA. All: biased and debiased CKA, mean, variance, score and p of the permutation
null, four scores of every layer with the errors of the delete-one jackknife, participation ratio, and the sample of
largest leverage. Processor time is the steadier of the two on a busy machine. Writes
benchmarks/results/statistics_cost.json.
"""

# cka_sweep comes first: it sets the threads before anything that starts them.
import time

from cka_sweep import LAYERS, REPEATS, SAMPLES, WIDTH, activations  # isort: skip
import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from environment import write_result

from jaxcrit.criteria.delta import deletions, layer_scores, values_without_each
from jaxcrit.selection import leverage
from jaxcrit.similarity import participation_ratio, permutation_null, sweep
from jaxcrit.similarity._grams import _grams, _refuse_degenerate


@jax.jit
def products(hidden):
    """``<G, G'>`` of all layers, ``[L, L]``, and what tells degenerate data."""
    grams, health = _grams(hidden, "linear", True)
    flat = grams.reshape(len(grams), -1)
    return jnp.matmul(flat, flat.T, precision="highest"), health


def bare(hidden):
    """Biased CKA alone."""
    found, health = products(hidden)
    _refuse_degenerate(health, hidden)
    values = np.asarray(found, np.float64)
    norms = np.sqrt(values.diagonal())
    return values / norms[:, None] / norms


def everything(hidden):
    """All statistics of one dataset."""
    tables = sweep(hidden)
    without = deletions(tables, reach=2)
    scores = layer_scores(tables, without=without)
    most = leverage(scores["delta_debiased"], values_without_each(tables, without=without))
    return scores, permutation_null(tables), participation_ratio(tables), most


def main(_):
    shape = LAYERS.value, SAMPLES.value, WIDTH.value
    hidden = jax.device_put(activations(*shape))
    wall, processor = {}, {}
    for number in range(REPEATS.value + 1):  # the first compiles
        for call in (bare, everything):
            start, start_processor = time.perf_counter(), time.process_time()
            call(hidden)
            spent = time.process_time() - start_processor, time.perf_counter() - start
            if number:
                processor[call.__name__] = min(processor.get(call.__name__, np.inf), spent[0])
                wall[call.__name__] = min(wall.get(call.__name__, np.inf), spent[1])
    ratio = {"processor": processor["everything"] / processor["bare"], "wall": wall["everything"] / wall["bare"]}
    print(f"L={shape[0]} N={shape[1]} D={shape[2]}, one thread, least of {REPEATS.value} rounds")
    print(f"bare {processor['bare']:.4f} s, all statistics {processor['everything']:.4f} s of processor time")
    print(f"ratio {ratio['processor']:.3f} of processor time, {ratio['wall']:.3f} of wall time")
    figures = {
        "shape": dict(zip(("layers", "samples", "width"), shape, strict=True)),
        "threads": 1,
        "rounds": REPEATS.value,
        "seconds_processor": processor,
        "seconds_wall": wall,
        "all_statistics_over_bare_sweep": ratio,
    }
    print(f"written: {write_result('statistics_cost', figures)}")


if __name__ == "__main__":
    app.run(main)
