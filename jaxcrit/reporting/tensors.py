"""The tensors of a model by their names: those of `transformers`, and those that other tools give them."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from jaxcrit.core.errors import UserError

if TYPE_CHECKING:
    from jaxcrit.models.config import ModelConfig

Trained = dict[str, int]  # weights that train, by tensor or module
LAYER = re.compile(r"model\.layers\.(\d+)\.")
_NO_LINEAR = ("embed_tokens", "norm", "mlp.gate")  # two-dimensional or not: no linear layer


@dataclasses.dataclass(frozen=True)
class Tensors:
    """What a model consists of; no numbers.

    Attributes:
        shapes: of every tensor, by name.
        num_layers: L.
        family: ``model_type`` of config.json.
    """

    shapes: Mapping[str, tuple[int, ...]]
    num_layers: int
    family: str

    @classmethod
    def of_model(cls, config: ModelConfig) -> Tensors:
        """The tensors that a model has in `transformers`, which holds a mixture's experts in one."""
        from jaxcrit.models.weights import hf_shapes  # which imports jax

        held = dataclasses.replace(config, fused_experts=config.experts > 0)
        return cls(hf_shapes(held), config.num_layers, config.family)

    def of_layers(self, layers: Iterable[int]) -> Trained:
        """Sizes of all tensors of some layers."""
        wanted = set(layers)
        return {name: size for name, size in self.sizes.items() if layer_of(name) in wanted}

    @functools.cached_property
    def sizes(self) -> Trained:
        """Numbers in every tensor."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    @property
    def mixture(self) -> bool:
        """Whether layers have experts."""
        return any(len(shape) == 3 for shape in self.shapes.values())

    @functools.cached_property
    def linears(self) -> dict[str, int]:
        """Weights of an adapter of rank 1 on each linear layer, by module; with the head, also where it is tied."""
        found = {
            name.removesuffix(".weight"): sum(shape)
            for name, shape in self.shapes.items()
            if name.endswith(".weight") and len(shape) == 2 and not name.removesuffix(".weight").endswith(_NO_LINEAR)
        }
        return {**found, "lm_head": sum(self.shapes["model.embed_tokens.weight"])}

    @functools.cached_property
    def modules(self) -> list[str]:
        """Names of all modules, the model itself aside."""
        whole = {*self.shapes, "lm_head.weight"}
        parts = [name.split(".")[:-1] for name in sorted(whole)]
        return list(dict.fromkeys(".".join(part[:end]) for part in parts for end in range(1, len(part) + 1)))


def layer_of(name: str) -> int | None:
    """The layer that a tensor or module belongs to; None outside of them."""
    found = LAYER.match(f"{name}.")
    return int(found[1]) if found else None


# Tensors under the names that a tool itself gives them.


@dataclasses.dataclass(frozen=True)
class Names:
    """How a tool calls the tensors of some families.

    Attributes:
        layer: what stands in front within a layer, ``{}`` standing for its number.
        tails: by transformers' name within a layer, the tool's.
        outside: the same of tensors outside the layers.
        families: those whose names these are.
    """

    layer: str
    tails: Mapping[str, str]
    outside: Mapping[str, str]
    families: tuple[str, ...]

    def of(self, tensors: Tensors, tool: str, layer: str = "") -> dict[str, str]:
        """By transformers' name the tool's.

        Args:
            tensors: of the model.
            tool: for messages.
            layer: in place of the usual one.

        Raises:
            UserError: a family whose names are not known.
        """
        found, strange = {}, []
        for name in tensors.shapes:
            number = layer_of(name)
            known = self.outside if number is None else self.tails
            tail = known.get(name if number is None else LAYER.sub("", name))
            if tail is None:
                strange.append(name)
            else:
                found[name] = tail if number is None else (layer or self.layer).format(number) + tail
        if strange or tensors.family not in self.families:
            why = f" ({strange[0]} has no name there)" if strange else ""
            raise UserError(
                f"{tool} names the tensors of {tensors.family} in a way that is not known here{why}; known are"
                f" {', '.join(self.families)}"
            )
        return found


_TORCHTUNE = {
    **{f"self_attn.{x}_proj.{kind}": f"attn.{x}_proj.{kind}" for x in "qkv" for kind in ("weight", "bias")},
    "self_attn.o_proj.weight": "attn.output_proj.weight",
    **{f"mlp.{x}_proj.weight": f"mlp.{w}.weight" for x, w in {"gate": "w1", "down": "w2", "up": "w3"}.items()},
    "input_layernorm.weight": "sa_norm.scale",
    "post_attention_layernorm.weight": "mlp_norm.scale",
}
_MAXTEXT = {
    **{
        f"self_attn.{x}_proj.{kind}": f"self_attention/{word}/{end}"
        for x, word in {"q": "query", "k": "key", "v": "value"}.items()
        for kind, end in {"weight": "kernel", "bias": "bias"}.items()
    },
    "self_attn.o_proj.weight": "self_attention/out/kernel",
    **{f"self_attn.{x}_norm.weight": f"self_attention/{w}_norm/scale" for x, w in {"q": "query", "k": "key"}.items()},
    **{f"mlp.{x}_proj.weight": f"mlp/{w}/kernel" for x, w in {"gate": "wi_0", "up": "wi_1", "down": "wo"}.items()},
    "input_layernorm.weight": "pre_self_attention_layer_norm/scale",
    "post_attention_layernorm.weight": "post_self_attention_layer_norm/scale",
}
_TUNIX = {
    **{f"self_attn.{x}_proj.weight": f"attn/{x}_proj/w" for x in "qkvo"},
    **{f"self_attn.{x}_proj.bias": f"attn/{x}_bias" for x in "qkv"},
    **{f"self_attn.{x}_norm.weight": f"attn/{x}_norm/w" for x in "qk"},
    **{f"mlp.{x}_proj.weight": f"mlp/{x}_proj/kernel" for x in ("gate", "up", "down")},
    **{f"{x}_layernorm.weight": f"{x}_layernorm/w" for x in ("input", "post_attention")},
}
TORCHTUNE = Names(
    "layers.{}.",
    _TORCHTUNE,
    {
        "model.embed_tokens.weight": "tok_embeddings.weight",
        "model.norm.weight": "norm.scale",
        "lm_head.weight": "output.weight",
    },
    ("llama", "mistral", "qwen2"),
)
MAXTEXT = Names(
    "params/decoder/layers_{}/",
    _MAXTEXT,
    {
        "model.embed_tokens.weight": "params/token_embedder/embedding",
        "model.norm.weight": "params/decoder/decoder_norm/scale",
        "lm_head.weight": "params/decoder/logits_dense/kernel",
    },
    ("llama", "qwen2", "qwen3"),
)
TUNIX = Names(
    "layers/{}/",
    _TUNIX,
    {
        "model.embed_tokens.weight": "embedder/input_embedding",
        "model.norm.weight": "final_norm/w",
        "lm_head.weight": "lm_head/w",
    },
    ("llama", "qwen2", "qwen3"),
)
