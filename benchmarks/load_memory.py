"""Peak anonymous memory of loading a float32 checkpoint as float32, against the checkpoint's size.

Writes a LLaMA-shaped checkpoint of random weights shard by shard, loads it in a fresh process that samples
its own anonymous resident memory (mappings of files are the kernel's cache, not the loader's memory), and
prints the ratio. Run as ``python benchmarks/load_memory.py`` (about a minute, 2.2 GB of temporary disk).
"""

from __future__ import annotations

import argparse
import json
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
# 540 M parameters: 2.15 GB in float32.
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 5504, "num_hidden_layers": 8, "num_attention_heads": 16, "max_position_embeddings": 2048,
}  # fmt: skip

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


def write_checkpoint(path: Path, layers: int) -> int:
    """Writes the checkpoint, one shard per layer and one for the rest, and returns the bytes of its weights."""
    raw = {**SHAPE, "num_hidden_layers": layers}
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
    measured = json.loads(done.stdout.splitlines()[-1])
    ratio = measured["peak"] / size
    result = {"checkpoint_bytes": size, **measured, "peak_ratio": ratio, "target": TARGET}
    print(
        f"checkpoint {size / 1e9:.2f} GB; anonymous memory {measured['before'] / 1e9:.2f} GB before loading, at most"
        f" {measured['peak'] / 1e9:.2f} GB: {ratio:.3f}x the checkpoint (target {TARGET}x); {measured['seconds']:.1f} s"
    )
    print(f"wrote {write_result('load_memory', result)}")


if __name__ == "__main__":
    main()
