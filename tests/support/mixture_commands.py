"""Every use of a model, on a tiny mixture of random weights: a table of the commands and what each found.

PYTHONPATH=.:tests python -m support.mixture_commands
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxcrit.commands.main import main
from jaxcrit.core.files import read_object
from jaxcrit.core.layers import read_scores
from jaxcrit.models import mixture
from support.tiny_model import prompts_file, tiny_checkpoint

TINY: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "num_hidden_layers": 5,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 4,
    "vocab_size": 328,
}
ROWS = "--data=rows.jsonl --template=none"
TRAIN = f"{ROWS} --eval_data=rows.jsonl --steps=2 --batch_size=8 --learning_rate=1e-2"
COMMANDS = {
    "inspect": "--model=model",
    "analyze": "--model=model --data=prompts.jsonl --template=none",
    "score": f"--model=model {ROWS}",
    "ablate": f"--model=model {ROWS} --sites=mlp",
    "finetune experts": f"--model=model --layers=1-2 {TRAIN} --router_aux=0.01",
    "finetune attention": f"--model=model --layers=first:2 --lora_rank=2 {TRAIN}",
    "finetune all": f"--model=model --layers=all {TRAIN}",
    "substitute": f"--base=model --tuned=finetune-all {ROWS} --window=1",
    "generate": "--model=model --data=prompts.jsonl --template=none --max_new_tokens=4",
    "reuse": f"--sender=model --receiver=finetune-all {ROWS} --max_new_tokens=2 --random=2",
    "prune": f"--model=model --drop=2 {ROWS} --controls=1",
    "export": "--model=finetune-experts",
}


def folder_of(path: Path) -> Path:
    """Writes a model, prompts and rows into a directory."""
    tiny_checkpoint(path / "model", **TINY)
    prompts = prompts_file(path / "prompts.jsonl", 16)
    (path / "rows.jsonl").write_text(prompts.read_text().replace('"}', '", "response": "one two"}'))
    return path


def run(name: str) -> str:
    """Runs a command in the current directory; what it found, in a line."""
    out, said = Path(name.replace(" ", "-")), io.StringIO()
    words = [name.split()[0], *COMMANDS[name].split(), *([] if name == "inspect" else [f"--out={out}"])]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(words)
    if code:
        return f"FAILED with {code}: {said.getvalue()[-300:]}"
    if (out / "scores.json").is_file():
        scores = list(read_scores(out / "scores.json").items())[-2:]
        return ", ".join(f"{key} {np.array2string(one.values, precision=3)}" for key, one in scores)
    record = read_object(out / "run.json", "a run") if (out / "run.json").is_file() else {}
    return json.dumps(record["result"])[:110] if "result" in record else " ".join(said.getvalue().split())[:110]


if __name__ == "__main__":
    mixture._SMALL = 0  # blocks of pairs, as larger models have it
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(folder_of(Path(scratch))):
        found = {}
        for command in COMMANDS:
            found[command] = run(command)
            print(f"| {command} | {found[command]} |", flush=True)
    sys.exit(any(line.startswith("FAILED") for line in found.values()))
