"""Models of six layers of every way to say which layer sees a window and which rotates."""

from typing import Any

from support.family_models import raw_config

# Windows and rotations by number, by period, by list; and families where all layers are alike.
CASES: dict[str, dict[str, Any]] = {
    "llama-tied": {},
    "phi3-longrope": {},
    "qwen2-mixed-sliding": {"max_window_layers": 3},
    "gemma2": {"layer_types": None},
    "gemma3-linear-capped": {},
    "olmo3-yarn": {},
    "smollm3": {"no_rope_layer_interval": 2, "no_rope_layers": None},
    "mixtral": {},
}


def deep(case):
    """Six layers."""
    raw = {**raw_config(case), "num_hidden_layers": 6, **CASES[case]}
    for key in ("layer_types", "no_rope_layers"):
        if isinstance(raw.get(key), list):
            raw[key] = (raw[key] * 6)[:6]
    return {key: value for key, value in raw.items() if value is not None}
