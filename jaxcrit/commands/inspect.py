"""``jaxcrit inspect``: what would be read of a model and what would be made of it. It runs and writes nothing."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any

from jaxcrit.commands import shared
from jaxcrit.core import console
from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import TEMPLATES, ModelOptions
from jaxcrit.core.options import option

if TYPE_CHECKING:
    from jaxcrit.models.model import Model

_ASKED = {"role": "user", "content": "What is 2 + 2?"}
_EXAMPLES: list[dict[str, Any]] = [
    {"prompt": _ASKED["content"], "response": "4"},
    {
        "messages": [
            _ASKED,
            {"role": "assistant", "content": "4"},
            {"role": "user", "content": "And 3 + 3?"},
            {"role": "assistant", "content": "6"},
        ]
    },
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectOptions(ModelOptions, title="model and data", positional=("model",)):
    """What ``jaxcrit inspect`` is asked."""

    step: str = option("", "of a run: checkpoint N, best or last (default: where it ended)", word="N|best|last")
    template: str = option("auto", "how the examples are wrapped", TEMPLATES)


OPTIONS = InspectOptions


def run(options: InspectOptions) -> int:
    """Opens the model and prints what there is to say."""
    from jaxcrit.models.model import open_model

    console.tell(model_text(open_model(options.model, step=options.step), options.template))
    shared.tell_next("inspect", options, None)
    return 0


def model_text(model: Model, template: str = "auto") -> str:
    """Everything that is decided when a model is opened, as text.

    Args:
        model: the model, as it was opened.
        template: value of ``--template``, see `render`.
    """
    config = model.config
    told = model.describe()
    parts = {
        "model": [
            f"{told['path']} ({told['hash'][:12]})",
            f"{config.family}: {config.num_layers} layers of width {config.width}, MLP {config.ff_width},"
            f" {config.num_heads} heads of {config.head_dim} ({config.num_kv_heads} of keys and values),"
            f" {config.vocab_size} tokens, context {config.max_length}",
            *(
                [f"mixture: {config.experts} experts in each layer, {config.experts_per_token} for a token"]
                if config.experts
                else []
            ),
            f"head: {'the embedding (tied)' if config.tied else 'its own'}",
        ],
        "files": [*_files(model), *model.checkpoint.notes, *_overlays(model)],
        "memory": _memory(model),
        "keys of config.json that play no part": [", ".join(config.ignored) or "none"],
        "attention": _attention(config),
        "tokenizer": _tokenizer(model),
        "answers end at": _stops(model),
    }
    lines = [line for title, told in parts.items() for line in (f"{title}:", *(f"  {one}" for one in told))]
    return "\n".join([*lines, "what is trained on (+):", *_examples(model, template)])


def _files(model: Model) -> list[str]:
    shards, dtypes = model.checkpoint.shards, model.checkpoint.dtypes
    stored = model.checkpoint.stored
    lines = [f"{'metadata' if stored else 'config.json'} of {model.checkpoint.path}"]
    for file in sorted(set(shards.values())):
        held = sorted(name for name, where in shards.items() if where == file)
        kinds = f"dequantised from {stored}" if stored else ", ".join(sorted({dtypes[name] for name in held}))
        lines.append(f"{file.name}: {len(held)} tensors, {kinds}, {_bytes(file.stat().st_size)}")
    return lines


def _overlays(model: Model) -> list[str]:
    lines = []
    for overlay in model.overlays:
        told = overlay.partition.to_json()
        lora = overlay.partition.lora
        what = f"adapters of rank {lora.rank} on {', '.join(lora.targets)}" if lora else "weights"
        outside = f"; whole: {', '.join(told['outside'])}" if told["outside"] else ""
        gains = f"; folded in: gains {', '.join(map(str, overlay.gains))}" if overlay.gains else ""
        where = overlay.run or "memory"
        lines.append(f"on top, from {where}: {what} of layers {_ranges(told['layers'])}{outside}{gains}")
    return lines


def _memory(model: Model) -> list[str]:
    import numpy as np

    from jaxcrit.models.checkpoint import DTYPES
    from jaxcrit.models.weights import hf_shapes

    counts = {name: math.prod(shape) for name, shape in hf_shapes(model.config).items()}
    widths = {name: np.dtype(DTYPES[model.checkpoint.dtypes[name]]).itemsize for name in counts}
    total, stored = sum(counts.values()), sum(count * widths[name] for name, count in counts.items())
    lines = [f"{total:,} weights, {_bytes(stored)} {'dequantised' if model.checkpoint.stored else 'as stored'}"]
    if model.dtype:
        lines.append(
            f"{_bytes(total * np.dtype(DTYPES[model.dtype]).itemsize)} in {model.dtype}, as they are read here"
        )
    return lines


def _attention(config: Any) -> list[str]:
    rope = config.rope
    lines = []
    for window, group in itertools.groupby(range(config.num_layers), lambda layer: config.windows[layer]):
        sees = "all tokens before" if window is None else f"{window} tokens, itself included"
        lines.append(f"layers {_ranges(list(group))} see {sees}")
    more = f"; other frequencies beyond {rope.boundary} tokens" if rope.boundary else ""
    return [*lines, f"RoPE: {rope.kind}, {rope.rotary_dim} of {config.head_dim} dimensions{more}"]


def _tokenizer(model: Model) -> list[str]:
    tokenizer = model.tokenizer
    marks = [f"{name} {token!r}" for name in ("bos", "eos", "pad") if (token := getattr(tokenizer, f"{name}_token"))]
    template = "has a chat template" if tokenizer.chat_template else "has no chat template"
    return [
        f"{type(tokenizer).__name__} of {model.checkpoint.tokenizer or model.checkpoint.path}, {len(tokenizer)} tokens",
        f"{', '.join(marks) or 'no BOS, no EOS'}; {template}",
    ]


def _stops(model: Model) -> list[str]:
    from jaxcrit.models.stops import known_stops

    called = model.tokenizer.convert_ids_to_tokens
    told = [f"{one} {called(one)!r}, of {where}" for one, where in known_stops(model).items()]
    return told or ["no token; by length alone"]


def _examples(model: Model, template: str) -> list[str]:
    """Rows rendered as they would be trained on, or why one cannot be."""
    from jaxcrit.commands.data import example_text
    from jaxcrit.data.inspection import show
    from jaxcrit.data.templates import render

    lines = []
    for number, row in enumerate(_EXAMPLES, 1):
        try:
            (example,) = render([row], model.tokenizer, template)
            lines.append(example_text(show(example, model.tokenizer, "example", number)))
        except UserError as error:
            lines.append(f"example, row {number}: {error}")
    return lines


def _bytes(count: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


def _ranges(layers: list[int]) -> str:
    """Layers as ``0-3,7``."""
    found: list[list[int]] = []
    for layer in layers:
        if found and layer == found[-1][-1] + 1:
            found[-1].append(layer)
        else:
            found.append([layer])
    return ",".join(f"{one[0]}-{one[-1]}" if len(one) > 1 else str(one[0]) for one in found) or "none"
