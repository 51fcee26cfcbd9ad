"""Memory and time of a sweep's forms where N is large: each in a process of its own, beside the resident form.

- at ``--common`` samples, where all forms run: time relative to the resident form, and the largest difference of their
  debiased CKA from it;
- at ``--samples``: time, memory, and the tiled form's difference from the streamed one;
- the streamed form over two sizes, from batches that are made, added and forgotten: its memory must not grow.

Memory is the process's largest resident set less what it was before the activations were there, and as a whole. Prints
a table; writes benchmarks/results/similarity_scale.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import numpy as np
from environment import write_result

LIMIT_GB = 4.0
_CHILD = """
import json, sys, time
from pathlib import Path

form, layers, samples, width, batch = sys.argv[1], *map(int, sys.argv[2:])

import jax, numpy as np
from jaxcrit.similarity import features
from jaxcrit.similarity import tiled
from jaxcrit.similarity import FeatureSums, from_tables, sweep

def resident(key):
    status = Path("/proc/self/status").read_text()
    return int(status.split(key + ":")[1].split()[0]) * 1024

def batches():
    # A chain of layers whose drift is largest in the middle, of decaying spectrum, with two large constant dimensions.
    scale = np.arange(1, width + 1, dtype=np.float32) ** -0.3
    for start in range(0, samples, batch):
        rng, size = np.random.default_rng(start), min(batch, samples - start)
        hidden = np.empty((layers, size, width), np.float32)
        hidden[0] = rng.standard_normal((size, width), np.float32) * scale
        for layer in range(1, layers):
            keep = np.float32(0.7 if layer == layers // 2 else 0.95)
            drift = rng.standard_normal((size, width), np.float32) * scale
            hidden[layer] = keep * hidden[layer - 1] + np.sqrt(1 - keep**2) * drift
        hidden[:, :, :2] += 100
        yield start, hidden

def streamed():
    sums = FeatureSums(layers, width)
    for _, hidden in batches():
        sums.add(hidden)
    return sums.tables()

jax.block_until_ready(jax.numpy.zeros(8) + 1)  # the runtime's own memory is there before
before = resident("VmRSS")
if form != "streamed":
    hidden = np.empty((layers, samples, width), np.float32)
    for start, part in batches():
        hidden[:, start : start + batch] = part
run = {"resident": lambda: sweep(hidden), "tiled": lambda: tiled(hidden), "features": lambda: features(hidden),
       "streamed": streamed}[form]
seconds = []
for _ in range(2):  # the first compiles
    began = time.perf_counter()
    tables = run()
    seconds.append(time.perf_counter() - began)
print(json.dumps({"seconds": seconds[1], "seconds_first": seconds[0], "before": before, "peak": resident("VmHWM"),
                  "debiased": from_tables(tables, "debiased").tolist()}))
"""


def run(form: str, layers: int, samples: int, width: int, batch: int) -> dict[str, Any]:
    """One form in a process of its own."""
    command = [sys.executable, "-c", _CHILD, form, *map(str, (layers, samples, width, batch))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--common", type=int, default=4000)
    parser.add_argument("--streams", type=int, nargs=2, default=(20_000, 100_000))
    parser.add_argument("--batch", type=int, default=500)
    given = parser.parse_args()
    shape = {"layers": given.layers, "width": given.width, "batch": given.batch}
    plan = [(form, given.common) for form in ("resident", "tiled", "features", "streamed")]
    plan += [(form, given.samples) for form in ("tiled", "features")]
    plan += [("streamed", samples) for samples in given.streams]
    rows, values = [], {}
    print(f"L={given.layers} D={given.width}; seconds are of the second run, streamed ones include making the batches")
    print(f"{'form':10} {'N':>8} {'seconds':>9} {'x resident':>11} {'peak GB':>8} {'of it sweep GB':>15}  difference")
    for form, samples in plan:
        taken = run(form, given.layers, samples, given.width, given.batch)
        values[form, samples] = np.array(taken.pop("debiased"))
        reference = values.get(("resident", samples), values.get(("tiled", samples)))
        difference = None if reference is None else float(np.abs(values[form, samples] - reference).max())
        ratio = taken["seconds"] / rows[0]["seconds"] if rows and samples == given.common else None
        rows.append({"form": form, "samples": samples, **taken, "times_resident": ratio, "difference": difference})
        shown = (f"{ratio:11.2f}" if ratio else " " * 11, f"{taken['peak'] / 1e9:8.2f}")
        own = (taken["peak"] - taken["before"]) / 1e9
        said = "" if difference is None else f"{difference:.1e}"
        print(f"{form:10} {samples:8} {taken['seconds']:9.2f} {shown[0]} {shown[1]} {own:15.2f}  {said}", flush=True)
    small, large = (row["peak"] - row["before"] for row in rows[-2:])
    most = max(row["peak"] for row in rows if row["samples"] == given.samples)
    print(f"N={given.samples}: at most {most / 1e9:.2f} GB resident (target {LIMIT_GB} GB)")
    print(f"streamed, {given.streams[1] / given.streams[0]:g} times the samples: {large / small:.3f} times the memory")
    result = {"shape": shape, "rows": rows, "peak_target": LIMIT_GB * 1e9, "streamed_memory_ratio": large / small}
    print(f"written: {write_result('similarity_scale', result)}")


if __name__ == "__main__":
    main()
