"""Peak memory of loading a float32 checkpoint as float32: against its size, and in two processes against one.

Writes a LLaMA-shaped checkpoint of random weights shard by shard, loads it in a fresh process that samples
its own anonymous resident memory (mappings of files are the kernel's cache, not the loader's memory), and
prints the ratio. Then splits the same weights over eight devices (``fsdp=8``), first of one process, then of two with
four each, which hash and load them, and compares how far their resident memory rises, mapped files included. Run as
``python benchmarks/load_memory.py`` (about a minute, 2.2 GB of temporary disk).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from environment import write_result
from safetensors.numpy import save_file

from jaxcrit.models.config import ModelConfig
from jaxcrit.models.weights import hf_shapes

TARGET = 1.2
SPLIT_TARGET = 0.65
# 540 M parameters: 2.15 GB in float32.
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "max_position_embeddings": 2048,
}

_CHILD = """
import json, sys, threading, time
from pathlib import Path

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

import jax
from jaxcrit.models.checkpoint import load, open_checkpoint

jax.block_until_ready(jax.numpy.zeros(8) + 1)  # the runtime's own memory is there before the clock starts
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
began = time.perf_counter()
decoder = load(open_checkpoint(Path(sys.argv[1])), dtype="float32")
jax.block_until_ready(jax.tree.leaves(decoder))
seconds = time.perf_counter() - began
done.set()
watcher.join()
print(json.dumps({"before": before, "peak": peak, "after": anonymous(), "seconds": seconds}))
"""


_SPLIT = """
import json, sys
from pathlib import Path

import jax
from jaxcrit.models.checkpoint import load, model_hash, open_checkpoint
from jaxcrit.parallel.distributed import start
from jaxcrit.parallel.mesh import make_mesh

path, port, process, count = sys.argv[1], *map(int, sys.argv[2:])
if count > 1:
    start("on", coordinator=f"localhost:{port}", num_processes=count, process_id=process)
mesh = make_mesh({"fsdp": 8})
everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(8), out_shardings=everywhere)())

def highest():
    # Not getrusage's, which begins with what the process that started this one had.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

before, checkpoint = highest(), open_checkpoint(Path(path))
identity = model_hash(checkpoint)
decoder = load(checkpoint, dtype="float32", mesh=mesh)
jax.block_until_ready(jax.tree.leaves(decoder))
print("\\n" + json.dumps({"hash": identity, "before": before, "peak": highest()}))
"""


def rises(path: Path, processes: int) -> list[int]:
    """How many bytes the resident memory of each process rises by, over imports, while it hashes and loads its part."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as cache:
        surroundings = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // processes}",
            "JAX_PLATFORMS": "cpu",
            "JAXCRIT_CACHE": cache,
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        started = [
            subprocess.Popen(
                [sys.executable, "-c", _SPLIT, str(path), str(port), str(process), str(processes)],
                env=surroundings,
                stdout=subprocess.PIPE,
                text=True,
            )
            for process in range(processes)
        ]
        outputs = [process.communicate(timeout=600)[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("a process failed; see above")
    measured = [json.loads(next(line for line in out.splitlines()[::-1] if line.startswith("{"))) for out in outputs]
    if len({one["hash"] for one in measured}) > 1:
        raise RuntimeError("the processes do not agree on what they read")
    return [one["peak"] - one["before"] for one in measured]


def write_checkpoint(path: Path, layers: int, **shape: int) -> int:
    """Writes the checkpoint, one shard per layer and one for the rest, and returns the bytes of its weights."""
    raw = {**SHAPE, **shape, "num_hidden_layers": layers}
    (path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    shapes = hf_shapes(ModelConfig.from_hf(raw))
    rng, weight_map, total = np.random.default_rng(0), {}, 0
    shards: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        shards.setdefault(f"model-{parts[2] if parts[1] == 'layers' else 'rest'}.safetensors", []).append(name)
    for file, names in shards.items():
        tensors = {name: rng.standard_normal(shapes[name], np.float32) for name in names}
        save_file(tensors, path / file, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
        weight_map |= dict.fromkeys(names, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="fewer for a smaller file")
    layers = parser.parse_args().layers
    with tempfile.TemporaryDirectory() as directory:
        size = write_checkpoint(Path(directory), layers)
        done = subprocess.run([sys.executable, "-c", _CHILD, directory], check=True, capture_output=True, text=True)
        one, two = rises(Path(directory), 1)[0], rises(Path(directory), 2)
    measured = json.loads(done.stdout.splitlines()[-1])
    ratio = measured["peak"] / size
    share = max(two) / one
    split = {"one_process": one, "two_processes": two, "ratio": share, "target": SPLIT_TARGET}
    result = {"checkpoint_bytes": size, **measured, "peak_ratio": ratio, "target": TARGET, "split": split}
    print(
        f"checkpoint {size / 1e9:.2f} GB; anonymous memory {measured['before'] / 1e9:.2f} GB before loading, at most"
        f" {measured['peak'] / 1e9:.2f} GB: {ratio:.3f}x the checkpoint (target {TARGET}x); {measured['seconds']:.1f} s"
    )
    print(
        f"split over 8 devices: resident memory rises by {one / 1e9:.2f} GB in one process, by"
        f" {' and '.join(f'{rise / 1e9:.2f}' for rise in two)} GB in each of two: {share:.3f}x (target {SPLIT_TARGET}x)"
    )
    print(f"wrote {write_result('load_memory', result)}")


if __name__ == "__main__":
    main()
