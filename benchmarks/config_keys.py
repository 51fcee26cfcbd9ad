"""Which keys of a config.json transformers' own code reads, by family: writes jaxcrit/models/config_keys.json.

    python benchmarks/config_keys.py --out=jaxcrit/models/config_keys.json [--configs=DIR] [--families=llama,phi3]

A tiny checkpoint of each family is loaded from its directory, run, and answers greedily past every window, while each
attribute that is read of its config is noted, those that are not there included. Then every key that was read, every
field of the config class, every default of generation and every key of the files in ``--configs`` is changed, one at a
time, and the model is loaded from the changed file: a key *changes* the model where the logits, or the tokens, are
others with any value that loads, or where no value loads at all. A key that was read and changes nothing is *inert*;
defaults of generation, which transformers takes where there is no generation_config.json, are *generation*. A key that
changes something and was not seen to be read (it is taken out before the config exists) is named.

Needs torch and the transformers of the extra ``parity``; the version is written into the table.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "olmo3",
    "granite",
    "smollm3",
    "olmoe",
    "qwen3_moe",
    "mixtral",
)
LENGTH, NEW = 24, 8
BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
# What a family needs so that its special keys can be seen at work in a model of three layers.
MORE: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 16},
    "phi3": {
        "sliding_window": 20,
        "original_max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.5] * 4},
    },
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 16},
    "gemma3_text": {"head_dim": 8, "sliding_window": 16},
    "olmo3": {"sliding_window": 16},
    "smollm3": {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention"] * 3},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 16,
    },
    "mixtral": {"num_local_experts": 4, "sliding_window": 16},
}
# Other values where those by type would be refused for their form alone.
VALUES: dict[str, list[Any]] = {
    "hidden_act": ["gelu", "relu"],
    "hidden_activation": ["gelu", "relu"],
    "layer_types": [["sliding_attention", "full_attention", "full_attention"], ["sliding_attention"] * 3],
    "rope_parameters": [
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "default", "rope_theta": 50.0},
    ],
    "rope_scaling": [
        {"rope_type": "linear", "factor": 4.0},
        {"type": "longrope", "short_factor": [2.0] * 4, "long_factor": [2.0] * 4},
    ],
    "rope_theta": [50.0],
    "rope_local_base_freq": [50.0],
    "partial_rotary_factor": [0.5],
    "dtype": ["bfloat16"],
    "torch_dtype": ["bfloat16"],
    "_attn_implementation": ["eager"],
    "attn_implementation": ["eager"],
    "id2label": [{"0": "a", "1": "b", "2": "c"}],
    "label2id": [{"a": 0, "b": 1, "c": 2}],
    "problem_type": ["regression"],
    "sliding_window": [4],
    "attention_chunk_size": [4],
    "max_window_layers": [0],
    "decoder_sparse_step": [2],
    "original_max_position_embeddings": [16],
    "no_rope_layers": [[0, 1, 1]],
    "no_rope_layer_interval": [2],
    "transformers_version": ["4.40.0"],
    "architectures": [["LlamaModel"], ["OtherForCausalLM"]],
    "pruned_heads": [{"0": [1]}],
}
SILENT = {"is_causal": True, "default_theta": 10000.0}  # what code falls back to where no class has the attribute
# Taken out of the file before a config exists, so that no attribute is read.
TAKEN_OUT = {
    "default_theta",
    "partial_rotary_factor",
    "rope_local_base_freq",
    "rope_scaling",
    "rope_theta",
    "sliding_window_pattern",
    "torch_dtype",
}
NOT_KEYS = {"model_type"}  # it chooses the family


class Reads:
    """Notes the name of every attribute that is read of any config, whether it is there or not."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __enter__(self) -> Reads:
        names, plain = self.names, PreTrainedConfig.__getattribute__
        self.plain = plain

        def noting(config: Any, name: str) -> Any:
            if not name.startswith("__") and not callable(getattr(type(config), name, None)):
                names.add(name)
            return plain(config, name)  # by the name that the class gives it, where that is another

        PreTrainedConfig.__getattribute__ = noting
        return self

    def __exit__(self, *_: object) -> None:
        PreTrainedConfig.__getattribute__ = self.plain


def outcome(folder: Path, raw: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
    """Logits, greedy tokens and dtype of the checkpoint in a folder under another config.json."""
    (folder / "config.json").write_text(json.dumps(raw))
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=False
    )
    if report["missing_keys"] or report["unexpected_keys"]:
        raise ValueError(f"other tensors: {report}")
    tokens = (torch.arange(LENGTH) * 7 % 60 + 3)[None]
    with torch.no_grad():
        logits = model.eval()(tokens, return_dict=True).logits
        answer = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, do_sample=False)
    return logits, answer if torch.is_tensor(answer) else answer.sequences, model.dtype


def others(key: str, value: Any) -> list[Any]:
    """Values to change a key to, by the type of its own."""
    if key in VALUES:
        return [other for other in VALUES[key] if other != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value * 2, value + 1, max(value // 2, 1)] if value else [1, 2]
    if isinstance(value, float):
        return [value * 2 + 0.25, value / 2]
    if isinstance(value, str):
        return [value + "x"]
    return [True, False, 2, 0.5, "x", [1], {"a": 1}]


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether logits agree but for rounding (two kernels of attention), and tokens and dtype exactly."""
    (logits, *rest), (others, *other_rest) = one, other
    near = logits.shape == others.shape and (logits - others).abs().max() <= 1e-5 * logits.abs().max()
    return bool(near) and torch.equal(rest[0], other_rest[0]) and rest[1] == other_rest[1]


def begin(folder: Path, raw: dict[str, Any]) -> tuple[tuple[Any, ...], set[str]]:
    """Writes a checkpoint of random weights, runs it, and names the attributes that were read of its config."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**copy.deepcopy(raw))
    )  # it writes into what it is given
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.3)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    with Reads() as reads:
        found = outcome(folder, raw)
    return found, reads.names


def record(family: str, further: set[str]) -> dict[str, Any]:
    """Lists of one family: ``changes`` with the value where the file is silent, and ``inert``."""
    raw = {"model_type": family, **BASE, **MORE.get(family, {})}
    config = AutoConfig.for_model(**copy.deepcopy(raw))
    silent = type(config)()
    fields = {field.name for field in dataclasses.fields(config)}
    changes: dict[str, Any] = {}
    inert = []
    with tempfile.TemporaryDirectory() as folder:
        first, read = begin(Path(folder), raw)
        for key in sorted((read | fields | further) - of_generation() - NOT_KEYS):
            now = raw.get(key, getattr(config, key, None))
            if isinstance(now, torch.dtype):
                now = str(now).removeprefix("torch.")
            results = [same for same in tried(Path(folder), raw, key, others(key, now), first) if same is not None]
            if not all(results) or not results:
                changes[key] = SILENT.get(key, plain(getattr(silent, key, None)))
                if key not in read | fields | TAKEN_OUT and results:
                    print(f"{family}: {key} changes the model, and was not seen to be read", flush=True)
            elif key in read | fields:
                inert.append(key)
    return {"changes": changes, "inert": inert}


def of_generation() -> set[str]:
    """Keys that say how answers are drawn, or in which form results come: not what the model is."""
    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    return names - {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"} | {"return_dict"}


def tried(
    folder: Path, raw: dict[str, Any], key: str, values: list[Any], first: tuple[Any, ...]
) -> Iterator[bool | None]:
    """For every value of a key, whether the model is the same; None where it does not load."""
    for value in values:
        try:
            yield same(outcome(folder, {**raw, key: value}), first)
        except Exception:  # whatever refuses the value
            yield None


def plain(value: Any) -> Any:
    """A default as JSON; None for what is none (a dtype)."""
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--configs", default="", help="folder of config.json files whose keys are tried too")
    parser.add_argument("--families", default=",".join(FAMILIES))
    options = parser.parse_args()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    further = set(TAKEN_OUT)
    for file in Path(options.configs).glob("*.json") if options.configs else ():
        further |= set(json.loads(file.read_text()))
    out = Path(options.out)
    held = json.loads(out.read_text()) if out.exists() else {}
    held = {**held, "transformers": transformers.__version__, "generation": sorted(of_generation())}
    for family in options.families.split(","):
        held[family] = record(family, further)
        print(f"{family}: { {kind: len(keys) for kind, keys in held[family].items()} }", flush=True)
    lines = [f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in held.items()]
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
