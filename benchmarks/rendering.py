"""Time and memory of rendering the paper's datasets, both editions: ``python benchmarks/rendering.py DIR TOKENIZER``.

DIR holds files such as ``dolly_train.jsonl`` (1,500 rows each); at most 2 s per file are allowed.
"""

import argparse
import time
import tracemalloc
from pathlib import Path

from environment import write_result

from jaxcrit.data.datasets import load
from jaxcrit.data.templates import render
from jaxcrit.data.tokenizer import load_tokenizer

TARGET = 2.0


def main() -> None:
    """Measures, prints, writes results/rendering.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("tokenizer", type=Path)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.tokenizer)
    figures = {}
    for file in sorted(arguments.data.glob("*_train.jsonl")):
        dataset = file.stem.partition("_")[0]
        began = time.perf_counter()
        (named,) = load(f"{dataset}:{file}", split="all")
        loading = time.perf_counter() - began
        for edition in ("clean", "paper"):
            began = time.perf_counter()
            examples = render(named.rows, tokenizer, dataset=dataset, edition=edition)
            seconds = time.perf_counter() - began
            tracemalloc.start()
            render(named.rows, tokenizer, dataset=dataset, edition=edition)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            tokens = sum(len(example.token_ids) for example in examples)
            kept = sum(example.token_ids.nbytes + len(example.prompt) for example in examples)
            figures[f"{dataset}, {edition}"] = {
                "rows": len(examples),
                "tokens": tokens,
                "load_seconds": round(loading, 3),
                "render_seconds": round(seconds, 3),
                "python_peak_mib": round(peak / 2**20, 1),
                "examples_mib": round(kept / 2**20, 1),
                "file_mib": round(file.stat().st_size / 2**20, 1),
                "within_target": seconds < TARGET,
            }
            print(f"{dataset}, {edition}:", figures[f"{dataset}, {edition}"])
    print(write_result("rendering", {"target_seconds": TARGET, "figures": figures}))


if __name__ == "__main__":
    main()
