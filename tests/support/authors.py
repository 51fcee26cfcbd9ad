"""What authors' released code chooses on the embedded model, kept in ``tests/goldens/recipes.json``.

    git clone https://github.com/c2d-usp/Layer-wise-LoRA-with-CKA          (Ogawa et al. 2026)
    git clone https://github.com/arcee-ai/PruneMe                          (of Gromov et al. 2024)
    git clone https://github.com/sramshetty/ShortGPT                       (of Men et al. 2024)
    PYTHONPATH=.:tests python -m support.authors DIR_OF_CLONES DIR_OF_TRAINERS

The second directory is that of `support.other_trainers`: Spectrum's rule is read in axolotl's plugin. Their functions
get the states of the embedded model; beside their choice stand the scores that jaxcrit gives, from which a recipe
chooses. Liu et al. released no code that selects.
"""

from __future__ import annotations

import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np

from jaxcrit.data.datasets import DEMO_PROMPTS
from support.other_trainers import _own

GOLDEN = Path(__file__).parent.parent / "goldens" / "recipes.json"
PROMPTS = DEMO_PROMPTS / "open.jsonl"
KEYS = ("block_influence", "angular_distance", "weight_snr")


def main(clones: Path, trainers: Path) -> None:
    """Runs them and writes the golden file."""
    import torch
    from safetensors.numpy import load_file

    from jaxcrit.commands.main import main as jaxcrit
    from jaxcrit.core.layers import read_scores

    with tempfile.TemporaryDirectory() as folder:
        ours, rows = (Path(folder, "analysis"), Path(folder, "scores")), f"--data={PROMPTS}"
        assert jaxcrit(["analyze", rows, "--embed", "--save_activations", f"--out={ours[0]}"]) == 0
        assert jaxcrit(["score", rows, f"--criteria={','.join(KEYS)}", f"--out={ours[1]}"]) == 0
        scores = {key: one for place in ours for key, one in read_scores(place / "scores.json").items()}
        (file,) = ours[0].rglob("activations.safetensors")
        held = load_file(file)
    states = [torch.tensor(np.asarray(one, np.float32)) for one in (held["embed"], *held["hidden"])]
    depth = len(states) - 1

    their: dict[str, list[int]] = {}
    file = clones / "Layer-wise-LoRA-with-CKA/decoder-only/select_layers_decoder.py"
    own = _own(file, "linear_cka", "sort_layers_by_cka", torch=torch)
    steps = [own["linear_cka"](states[layer], states[layer + 1]) for layer in range(depth)]
    their["ogawa2026"] = own["sort_layers_by_cka"](steps)[: int(0.5 * depth)]

    own = _own(
        clones / "PruneMe/compute_block_similarity/utils.py", "angular_distance", "compute_block_distances", torch=torch
    )
    for count in range(1, depth // 2 + 1):
        distances = own["compute_block_distances"](states[1:], count)
        first = 1 + int(np.argmin(distances))
        their[f"gromov:{count}"] = list(range(first, first + count))

    values = scores["block_influence"].values
    model = types.SimpleNamespace(model=types.SimpleNamespace(layers=list(range(depth))))
    short = _own(clones / "ShortGPT/short_gpt/short_llama.py", "ShortLlama", np=np, torch=torch, Llama=None)[
        "ShortLlama"
    ]
    count = max(1, depth // 4)
    asked = types.SimpleNamespace(importances=values.tolist(), n_prune_layers=count, llama=model)
    their["shortgpt"] = short.remove_layers(asked)

    rule = _own(trainers / "axolotl/integrations/spectrum/__init__.py", "_generate_unfrozen_params_yaml")
    ratios = {
        str(layer): {"type": "layer", "snr": one} for layer, one in enumerate(scores["weight_snr"].values.tolist())
    }
    picked = rule["_generate_unfrozen_params_yaml"](ratios, 0.5)
    their["spectrum"] = [int(one) for one in picked if one.isdecimal()]

    kept = ("delta", "delta_debiased", "step", "step_debiased", *KEYS)
    content: dict[str, Any] = {
        "authors": {name: sorted(map(int, layers)) for name, layers in their.items()},
        "steps": [round(step, 6) for step in steps],
        "scores": {key: scores[key].to_json() for key in kept},
    }
    for one in content["scores"].values():
        one["meta"] = {key: value for key, value in one["meta"].items() if key in ("position", "num_samples", "bias")}
    GOLDEN.write_text(json.dumps(content, separators=(",", ":")).replace('},"', '},\n"') + "\n", encoding="utf-8")
    print(json.dumps(content["authors"]), content["steps"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
