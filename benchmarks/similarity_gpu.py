"""Warm times of a CKA sweep on an accelerator, beside pytorch-cka on the same numbers; predicted times stand below.

For N=300, 1e3, 1e4, 1e5 (L=32, D=4096, debiased CKA of all pairs): jaxcrit in the form its cost model chooses, and in
the others that fit, at float32 products (HIGHEST); pytorch-cka (``cka_from_features``, float32 without TF32), where its
Grams fit. Errors are against float64 on 2 of the layers, up to N=1e4. The ceiling is the best measured time
of a float32 product of 8192^3 by the same library; a share is the sweep's operations over its time, of that ceiling.

Activations are made on the device from a seed, as a drifting chain with two dimensions of mean 100. Run where torch and
jax both see the accelerator; ``--jax_only`` leaves torch out. On a CPU give tiny sizes: it then only shows that the
script runs. Prints a table; writes benchmarks/results/similarity_gpu.json (with ``--out`` another name).

Predicted before any run, for an H200 (float32 without tensor cores: 60 TFLOP/s at 80 % of the ceiling, 4.3 TB/s):

| N | form | operations | predicted |
| --- | --- | --- | --- |
| 300 | resident | 24 G | 2 ms: 0.5 of products, the rest 300 small contractions and launches |
| 1,000 | resident | 266 G | 8 ms |
| 10,000 | tiled | 13.5 T | 0.3 s: 0.27 of products, 0.03 of tables to the host |
| 100,000 | tiled | 1.35 P | 28 s |
| 10,000 | pytorch-cka | 26 T | 0.55 s, 26 GB of Grams, three times over where it masks diagonals |
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from environment import write_result

from jaxcrit.parallel.mesh import device_memory, make_mesh
from jaxcrit.similarity import Form, choose_form, features, from_tables, sweep, tiled

PREDICTED = {
    "300 resident": 0.002,
    "1000 resident": 0.008,
    "10000 tiled": 0.3,
    "100000 tiled": 28.0,
    "10000 pytorch-cka": 0.55,
}


@jax.jit
def _drift(state: jax.Array, key: jax.Array) -> jax.Array:
    scale = jnp.arange(1, state.shape[1] + 1, dtype=jnp.float32) ** -0.3
    return 0.95 * state + 0.3 * scale * jax.random.normal(key, state.shape)


def activations(layers: int, samples: int, width: int) -> jax.Array:
    """``[L, N, D]`` float32 on the device."""
    keys = jax.random.split(jax.random.key(0), layers)
    state, states = jnp.zeros((samples, width)), []
    for key in keys:
        state = _drift(state, key)
        states.append(state.at[:, :2].add(100))
    return jnp.stack(states)


def warm(call: Callable[[], Any], rounds: int) -> float:
    """Least time of several rounds after one that compiles."""
    call()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def exact(hidden: np.ndarray) -> float:
    """Debiased CKA of two layers in float64."""
    products = np.zeros((2, 2))
    count = hidden.shape[1]
    grams = []
    for x in hidden.astype(np.float64):
        x = x - x.mean(axis=0)
        gram = x @ x.T
        np.fill_diagonal(gram, 0)
        sums = gram.sum(axis=0) / (count - 2)
        gram += -sums[:, None] - sums[None, :] + sums.sum() / (count - 1)
        np.fill_diagonal(gram, 0)
        grams.append(gram)
    for i in range(2):
        for j in range(2):
            products[i, j] = np.vdot(grams[i], grams[j])
    return float(products[0, 1] / np.sqrt(products[0, 0] * products[1, 1]))


def jax_ceiling(size: int, rounds: int) -> float:
    """Operations per second of a float32 product."""
    a = jnp.ones((size, size))
    product = jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST))
    return 2 * size**3 / warm(lambda: product(a).block_until_ready(), rounds)


def torch_side(hidden: jax.Array, rounds: int, size: int) -> tuple[float, np.ndarray, float]:
    """Time, values and ceiling of pytorch-cka."""
    import torch
    from cka import cka_from_features

    torch.backends.cuda.matmul.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    same = torch.from_numpy(np.array(hidden)).to(device)

    def timed(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            found = call()
            if device == "cuda":
                torch.cuda.synchronize()
            return found

        return run

    call = timed(lambda: cka_from_features(same, same))
    a = torch.ones(size, size, device=device)
    ceiling = 2 * size**3 / warm(timed(lambda: a @ a), rounds)
    return warm(call, rounds), call().cpu().numpy(), ceiling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--samples", type=int, nargs="+", default=(300, 1000, 10_000, 100_000))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ceiling", type=int, default=8192, help="size of the product that sets the ceiling")
    parser.add_argument("--jax_only", action="store_true")
    parser.add_argument("--out", default="similarity_gpu")
    given = parser.parse_args()
    device, memory = jax.devices()[0], device_memory(make_mesh())
    ceiling = jax_ceiling(given.ceiling, given.rounds)
    print(f"{device.device_kind}: {ceiling / 1e12:.2f} TFLOP/s in float32 products of {given.ceiling}")
    print(f"{'N':>7} {'who':12} {'seconds':>10} {'predicted':>10} {'of ceiling':>10} {'error':>9}")
    rows: list[dict[str, Any]] = []

    def note(
        samples: int, who: str, seconds: float, operations: float, of: float, error: float | None, why: str
    ) -> None:
        predicted = PREDICTED.get(f"{samples} {who}") if (given.layers, given.width) == (32, 4096) else None
        share = operations / seconds / of
        rows.append(
            {
                "samples": samples,
                "who": who,
                "seconds": seconds,
                "predicted": predicted,
                "operations": operations,
                "share_of_ceiling": share,
                "error": error,
                "form": why,
            }
        )
        shown = (f"{predicted:10.4f}" if predicted else " " * 10, "" if error is None else f"{error:9.1e}")
        print(f"{samples:7} {who:12} {seconds:10.4f} {shown[0]} {share:10.1%} {shown[1]}", flush=True)

    for samples in given.samples:
        hidden = activations(given.layers, samples, given.width)
        truth = exact(np.asarray(hidden[:2])) if samples <= 10_000 else None
        shape = (samples, given.width, given.layers)
        best = choose_form(*shape, memory=memory, stored=True)
        chosen: list[Form] = [best]
        for name in ("resident", "tiled", "features"):
            other = choose_form(*shape, memory=memory, stored=True, asked=name)
            if name != best.name and other.memory <= memory and other.flops <= 20 * best.flops:
                chosen.append(other)
        calls = {"resident": sweep, "tiled": tiled, "features": features}
        for form in chosen:
            call = lambda form=form: from_tables(calls[form.name](hidden), "debiased")  # noqa: E731, B023
            rounds = given.rounds if form.flops < 1e14 else 1
            seconds = warm(call, rounds)
            error = None if truth is None else abs(float(call()[0, 1]) - truth)
            note(samples, form.name, seconds, form.flops, ceiling, error, str(form))
        grams = 8.0 * given.layers * samples**2
        if not given.jax_only and 2 * grams <= memory:
            seconds, values, torch_ceiling = torch_side(hidden, given.rounds, given.ceiling)
            error = None if truth is None else abs(float(values[0, 1]) - truth)
            operations = 2.0 * given.layers * samples**2 * (given.width + given.layers)
            note(samples, "pytorch-cka", seconds, operations, torch_ceiling, error, "cka_from_features")
    found = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    if not given.jax_only:
        found |= {name: importlib.metadata.version(name) for name in ("torch", "pytorch-cka")}
    result = {
        "device": device.device_kind,
        "precision": "float32 products (HIGHEST; TF32 off)",
        "versions": found,
        "shape": {"layers": given.layers, "width": given.width},
        "ceiling": ceiling,
        "rows": rows,
    }
    print(f"written: {write_result(given.out, result)}")


if __name__ == "__main__":
    main()
