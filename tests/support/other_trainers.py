"""What other trainers themselves make of files that name layers, kept in ``tests/goldens/interchange.json``.

    pip download --no-deps --python-version=3.12 --only-binary=:all: -d wheels axolotl==0.19.0 llamafactory==0.9.5 \\
        ms-swift==4.6.0 torchtune==0.6.1 maxtext==0.2.5 google-tunix==0.1.7 qwix==0.1.8 trl==1.16.0
    for wheel in wheels/*.whl; do unzip -q -d trainers "$wheel"; done
    pip install peft==0.21.2 mergekit==0.1.5 transformers torch flax jaxtyping
    PYTHONPATH=.:tests python -m support.other_trainers trainers

Each tool's own function decides, on a tiny model. Of tools that need a GPU or a hundred packages to import, the
functions alone are taken out of the wheel and run; what surrounds them here is said beside each.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import json
import logging
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

GOLDEN = Path(__file__).parent.parent / "goldens" / "interchange.json"
LAYERS = (1, 5, 10)  # of 12: what is written for 1 must not match 10 and 11
_SHAPE = {
    "num_hidden_layers": 12,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 16,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SHAPE},
    "qwen2": {"model_type": "qwen2", **_SHAPE},
    "phi3": {"model_type": "phi3", "pad_token_id": 0, **_SHAPE},
    "tied": {"model_type": "llama", **_SHAPE, "tie_word_embeddings": True},
    "mixture": {
        "model_type": "qwen3_moe",
        **_SHAPE,
        "head_dim": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 6,
    },
}


# By format, the models that its selections are written for; all of them where none are named.
FAMILIES = {
    **dict.fromkeys(("torchtune", "maxtext"), ("llama", "qwen2")),
    **dict.fromkeys(("tunix", "nnx", "mergekit"), ("llama",)),
    "llamafactory-freeze": ("llama", "mixture"),
}


def _peft(**more: Any) -> str:
    return json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, **more}) + "\n"


_Q = {"target_modules": ["q_proj"]}
_LORA = "use_peft: true\nlora_r: 8\nlora_target_modules:\n"
_OPEN = "unfrozen_parameters:\n"
_ADAPT = "finetuning_type: lora\nlora_target: "
_FULL = "tuner_type: full\n"
_SWIFT = "tuner_type: full\nfreeze_parameters_ratio: 1.0\n"
_FREEZE = "finetuning_type: freeze\nfreeze_trainable_layers: "
_MERGE = "merge_method: passthrough\nslices:\n"
_HEAD = "  - ^model.embed_tokens.weight$\n  - ^lm_head.weight$\n"
# By format, files that are not what `LAYERS` asks for, or that only look so.
OTHERS: dict[str, dict[str, str]] = {
    "peft": {
        "off by one": _peft(**_Q, layers_to_transform=[2, 6, 11], layers_pattern="layers"),
        "1 is the start of 10": _peft(target_modules=r"model\.layers\.1.*\.q_proj"),
        "no such module": _peft(target_modules=["q_porj"], layers_to_transform=[1, 5, 10]),
        "all-linear takes no layers": _peft(
            target_modules="all-linear", layers_to_transform=[1], layers_pattern="layers"
        ),
        "names in full take no layers": _peft(target_modules=["model.layers.3.mlp.up_proj"], layers_to_transform=[1]),
        "another pattern": _peft(**_Q, layers_to_transform=[1], layers_pattern="h"),
        "no pattern": _peft(**_Q, layers_to_transform=[1, 11]),
        "patterns": _peft(**_Q, layers_to_transform=1, layers_pattern=["h", "layers"]),
        "a pattern without layers": _peft(**_Q, layers_pattern="layers"),
        "an expression and layers": _peft(target_modules=".*q_proj", layers_to_transform=[1]),
        "all-linear": _peft(target_modules="all-linear"),
        "all-linear, mixture": _peft(target_modules="all-linear"),
        "all-linear, tied": _peft(target_modules="all-linear"),
        "the head, tied": _peft(target_modules=["lm_head"]),
        "the router, mixture": _peft(target_modules=["gate"]),
        "no layers": _peft(**_Q, layers_to_transform=[]),
        "ranks": _peft(target_modules=["q_proj", "up_proj"], rank_pattern={r"layers\.(1|5)\..*": 2, "up_proj": 3}),
        "ranks of 1 and of 10": _peft(**_Q, rank_pattern={r"layers\.1.*": 4}),
        "a whole layer": _peft(target_modules=r"model\.layers\.1"),
        "a norm": _peft(target_modules=["input_layernorm"]),
        "embedding and head": _peft(target_modules=["embed_tokens", "lm_head"]),
        "saved": _peft(target_modules=["q_proj", "lm_head"], layers_to_transform=[1], modules_to_save=["lm_head"]),
        "excluded": _peft(**_Q, exclude_modules=["layers.3.self_attn.q_proj"]),
        "excluded by expression": _peft(**_Q, exclude_modules=r".*\.1\d?\..*"),
    },
    "trl": {
        "off by one": _LORA + "  - 'model\\.layers\\.(2|6|11)\\.self_attn\\.q_proj'\n",
        "1 is the start of 10": _LORA + "  - 'model\\.layers\\.1.*\\.q_proj'\n",
        "two expressions are names": _LORA + "  - 'model\\.layers\\.1\\.self_attn\\.q_proj'\n  - '.*v_proj'\n",
        "a name alone is an expression": _LORA + "  - q_proj\n",
        "names": _LORA + "  - q_proj\n  - v_proj\n",
        "an expression, mixture": _LORA + "  - 'model\\.layers\\.(1|5|10)\\.self_attn\\.q_proj'\n",
        "no adapters": "use_peft: false\nlora_target_modules:\n  - q_proj\n",
    },
    "axolotl": {
        "off by one": _OPEN + "  - ^model.layers.2.\n  - ^model.layers.6.\n  - ^model.layers.11.\n",
        "1 is the start of 10": _OPEN + "  - ^model.layers.1\n",
        "dots escaped twice": _OPEN + "  - '^model\\.layers\\.1\\.'\n",
        "not from the start": _OPEN + "  - layers.1.\n",
        "rows": _OPEN + "  - ^model.embed_tokens.weight$[:4]\n  - ^lm_head.weight$[3]\n  - ^lm_head.weight$[2:6]\n",
        "expressions": _OPEN + "  - model.layers.1[01].mlp.+\n  - model.layers.[0-2].self_attn.[qk]_proj.weight$\n",
        "none": "unfrozen_parameters: []\n",
        "the head, tied": _OPEN + _HEAD,
        "experts, mixture": _OPEN + "  - model.layers.1.mlp.experts.\n  - model.layers.11.mlp.gate.\n",
    },
    "llamafactory": {
        "off by one": _ADAPT + "model.layers.2.self_attn.q_proj,model.layers.6.self_attn.q_proj\n",
        "all": _ADAPT + "all\n",
        "ends of names": _ADAPT + "1.self_attn.q_proj, v_proj\nlora_rank: 4\n",
        "no such module": _ADAPT + "layers.1\n",
        "saved": _ADAPT + "q_proj\nadditional_target: embed_tokens,lm_head\n",
    },
    "llamafactory-freeze": {
        "last": _FREEZE + "3\nfreeze_trainable_modules: all\n",
        "first": _FREEZE + "-2\nfreeze_trainable_modules: all\n",
        "first two by 1, not 10": _FREEZE + "-2\nfreeze_trainable_modules: mlp,self_attn\n",
        "every fourth": _FREEZE + "3\nfreeze_trainable_modules: all\nuse_llama_pro: true\n",
        "norm is a part of names": _FREEZE + "1\nfreeze_trainable_modules: all\nfreeze_extra_modules: norm\n",
        "no such module": _FREEZE + "1\nfreeze_trainable_modules: attn\n",
        "more than there are": _FREEZE + "40\nfreeze_trainable_modules: all\n",
    },
    "swift": {
        "off by one": _SWIFT
        + "trainable_parameters:\n  - model.layers.2.\n  - model.layers.6.\n  - model.layers.11.\n",
        "1 is the start of 10": _SWIFT + "trainable_parameters:\n  - model.layers.1\n",
        "nothing trains": _SWIFT + "trainable_parameters:\n  - layers.1.\n",
        "expression": _SWIFT + "trainable_parameters_regex: 'layers\\.(1|5|10)\\.'\n",
        "no expression": _SWIFT + "trainable_parameters_regex: 'layers.(1|5'\n",
        "frozen": _FULL + "freeze_parameters:\n  - model.layers.1\n  - lm_head\nfreeze_parameters_regex: norm\n",
        "frozen and trained": _FULL + "freeze_parameters:\n  - model\ntrainable_parameters:\n  - model.layers.11.\n",
        "the head, tied": _SWIFT + "trainable_parameters:\n  - lm_head\n",
        "frozen by no expression": _FULL + "freeze_parameters_regex: '(('\n",
    },
    "torchtune": {
        "off by one": "layers.2.attn.q_proj.weight\nlayers.6.attn.q_proj.weight\n",
        "names of transformers": "model.layers.1.self_attn.q_proj.weight\n",
        "the start of names": "layers.1\n",
        "some": "layers.1.mlp.w1.weight\nlayers.11.sa_norm.scale\nnorm.scale\n",
    },
    "maxtext": {
        "off by one": "scan_layers: false\ntrainable_parameters_mask: ['decoder/layers_(2|6|11)/']\n",
        "1 is the start of 10": "scan_layers: false\ntrainable_parameters_mask: ['layers_1']\n",
        "scanned": "trainable_parameters_mask: ['decoder/layers_(1|5|10)/']\n",
        "scanned, all": "scan_layers: true\ntrainable_parameters_mask: ['decoder/layers/mlp']\n",
        "names of transformers": "scan_layers: false\ntrainable_parameters_mask: ['model.layers.1.']\n",
        "none": "scan_layers: false\ntrainable_parameters_mask: []\n",
    },
    "tunix": {
        "off by one": "lora_config:\n  module_path: 'layers/(2|6|11)/attn/q_proj'\n  rank: 8\n  alpha: 16.0\n",
        "1 is the start of 10": "lora_config:\n  module_path: '.*layers/1.*q_proj'\n  rank: 2\n  alpha: 4.0\n",
        "dots": "lora_config:\n  module_path: 'layers\\.1\\.attn\\.q_proj'\n  rank: 8\n  alpha: 16.0\n",
        "half a path": "lora_config:\n  module_path: 'q_proj'\n  rank: 8\n  alpha: 16.0\n",
    },
    "nnx": {
        "off by one": "nnx.All(nnx.Param, nnx.Any(nnx.PathContains(2), nnx.PathContains(6)))\n",
        "1 is a part of 10": "nnx.All(nnx.Param, nnx.PathContains(1, exact=False))\n",
        "numbers as texts": "nnx.All(nnx.Param, nnx.PathContains('1'))\n",
        "not": "nnx.All(nnx.Not(nnx.PathContains('layers')), nnx.Param)\n",
    },
    "mergekit": {
        "off by one": _MERGE + "  - sources: [{model: MODEL, layer_range: [0, 4]}]\n"
        "  - sources: [{model: MODEL, layer_range: [6, 12]}]\n",
        "beyond the end": _MERGE + "  - sources: [{model: MODEL, layer_range: [0, 14]}]\n",
    },
}


def cases() -> dict[str, dict[str, dict[str, str]]]:
    """By format and name: a model's name and a file; ``ours`` in the name is what is written for `LAYERS`."""
    from jaxcrit.core.layers import LayerSet
    from jaxcrit.reporting.exporters import Asked, export_selection

    chosen = LayerSet(LAYERS, "manual", "1,5,10", 12)
    found: dict[str, dict[str, dict[str, str]]] = {}
    for fmt in OTHERS:
        mine: dict[str, dict[str, str]] = {}
        for family in FAMILIES.get(fmt, MODELS):
            layers = LayerSet((9, 10, 11), "manual", "last:3", 12) if fmt == "llamafactory-freeze" else chosen
            text = export_selection(layers, fmt, asked=Asked("MODEL", tensors(family).family, tensors(family)))
            mine[f"ours, {family}"] = {"model": family, "text": text}
        if fmt == "peft":
            text = export_selection(chosen, fmt, asked=Asked("MODEL", "llama", tensors("llama"), 4, 2, ("q", "v")))
            mine["ours, two ranks"] = {"model": "llama", "text": text}
        for name, text in OTHERS[fmt].items():
            model = name.rpartition(", ")[2]
            mine[name] = {"model": model if model in MODELS else "llama", "text": text}
        found[fmt] = mine
    return found


def tensors(family: str) -> Any:
    """A model of `MODELS` as matchers see it."""
    from jaxcrit.models.config import ModelConfig
    from jaxcrit.reporting.tensors import Tensors

    return Tensors.of_model(ModelConfig.from_hf(MODELS[family]))


# What follows runs where the tools are; tests do not reach it.


def _own(file: Path, *names: str, **around: Any) -> dict[str, Any]:
    """Functions, classes and constants of a file, run without the rest of it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    wanted = []
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        called = {getattr(node, "name", ""), *(getattr(target, "id", "") for target in targets)}
        if called & set(names):
            wanted.append(node)
    assert len(wanted) == len(names), (file, names, [ast.dump(node)[:60] for node in wanted])
    future = ast.parse("from __future__ import annotations").body
    everything = importlib.import_module("typing").__dict__
    space = {**everything, "re": re, "logger": logging.getLogger("own"), "LOG": logging.getLogger("own"), **around}
    space["__name__"] = "own"
    sys.modules.setdefault("own", types.ModuleType("own")).__dict__.update(space)
    exec(compile(ast.Module([*future, *wanted], []), str(file), "exec"), space)
    return space


def _torch_model(family: str) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    config = dict(MODELS[family])
    return transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    )


def _requires_grad(model: Any) -> dict[str, int]:
    """Weights that train, by tensor; of adapters by the module they are on."""
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            name = re.sub(r"\.lora_(embedding_)?[AB](\.default)?(\.weight)?$", "", name)
            found[name] = found.get(name, 0) + parameter.numel()
    return found


class Tools:
    """The tools in a directory of unpacked wheels; one method per format, named like it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def peft(self, model: str, text: str, **config: Any) -> dict[str, int]:
        from peft import LoraConfig, get_peft_model

        return _requires_grad(get_peft_model(_torch_model(model), LoraConfig(**(config or json.loads(text)))))

    def trl(self, model: str, text: str) -> dict[str, int]:
        import dataclasses

        import yaml
        from peft import LoraConfig, get_peft_model

        kinds = {"dataclass": dataclasses.dataclass, "field": dataclasses.field}
        config = _own(self.root / "trl/trainer/model_config.py", "ModelConfig", **kinds)["ModelConfig"]
        make = _own(
            self.root / "trl/trainer/utils.py",
            "get_peft_config",
            LoraConfig=LoraConfig,
            ModelConfig=config,
            is_peft_available=lambda: True,
        )["get_peft_config"]
        adapters = make(config(**yaml.safe_load(text)))
        whole = _torch_model(model)
        return _requires_grad(whole if adapters is None else get_peft_model(whole, adapters))

    def axolotl(self, model: str, text: str) -> dict[str, int]:
        import yaml

        file, whole = self.root / "axolotl/utils/freeze.py", _torch_model(model)
        names = [
            node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)
        ]
        own = _own(file, *names, is_main_process=lambda: False)
        if patterns := yaml.safe_load(text)["unfrozen_parameters"]:  # as axolotl/train.py asks
            own["freeze_layers_except"](whole, patterns)
        found = {}
        for name, parameter in whole.named_parameters():
            if parameter.requires_grad:  # rows are frozen by a hook on the gradient
                (parameter * parameter.detach().fill_(1.0)).sum().backward()
                found[name] = int((parameter.grad != 0).sum())
        return found

    def llamafactory(self, model: str, text: str) -> dict[str, int]:
        import torch
        import yaml
        from peft import LoraConfig, TaskType, get_peft_model

        package = self.root / "llamafactory"
        spec = importlib.machinery.SourceFileLoader("finetuning_args", str(package / "hparams/finetuning_args.py"))
        arguments = types.ModuleType("finetuning_args")
        sys.modules["finetuning_args"] = arguments
        spec.exec_module(arguments)
        asked = arguments.FinetuningArguments(**yaml.safe_load(text))
        quiet = types.SimpleNamespace(info_rank0=print, warning_rank0=print)
        composite: dict[str, Any] = {"COMPOSITE_MODELS": {}, "logger": quiet}
        visual = _own(
            package / "model/model_utils/visual.py", "get_forbidden_modules", "patch_target_modules", **composite
        )
        modules = _own(package / "model/model_utils/misc.py", "find_all_linear_modules", **composite)
        own = _own(
            package / "model/adapter.py",
            "_setup_freeze_tuning",
            "_setup_lora_tuning",
            **{**visual, **modules, **composite},
            torch=torch,
            LoraConfig=LoraConfig,
            TaskType=TaskType,
            get_peft_model=get_peft_model,
            is_deepspeed_zero3_enabled=lambda: False,
        )
        whole = _torch_model(model)
        if asked.finetuning_type == "freeze":
            own["_setup_freeze_tuning"](whole, asked, True, False)
            return _requires_grad(whole)
        plain = types.SimpleNamespace(adapter_name_or_path=None, use_kt=False, use_unsloth=False, resize_vocab=False)
        return _requires_grad(own["_setup_lora_tuning"](whole.config, whole, plain, asked, True, False))

    llamafactory_freeze = llamafactory

    def swift(self, model: str, text: str) -> dict[str, int]:
        import bisect
        import contextlib

        import yaml

        own = _own(
            self.root / "swift/utils/transformers_utils.py",
            "freeze_parameters",
            "activate_parameters",
            "get_n_params_grads",
            np=np,
            nn=mock.MagicMock(),
            bisect_right=bisect.bisect_right,
            nullcontext=contextlib.nullcontext,
            is_deepspeed_zero3_enabled=lambda: False,
        )
        given = yaml.safe_load(text)
        assert given.pop("tuner_type") == "full"
        lists = {"freeze_parameters": [], "trainable_parameters": [], "freeze_parameters_ratio": 0.0}
        expressions = dict.fromkeys(("freeze_parameters_regex", "trainable_parameters_regex"))
        asked = types.SimpleNamespace(**{**lists, **expressions, **given})
        whole = _torch_model(model)
        whole.requires_grad_(True)  # these lines as in swift/pipelines/train/tuner.py
        own["freeze_parameters"](
            whole, asked.freeze_parameters_ratio, asked.freeze_parameters, asked.freeze_parameters_regex
        )
        if asked.trainable_parameters or asked.trainable_parameters_regex:
            own["activate_parameters"](whole, asked.trainable_parameters, asked.trainable_parameters_regex)
        return _requires_grad(whole)

    def torchtune(self, model: str, text: str) -> dict[str, int]:
        package = self.root / "torchtune"
        called = _own(package / "models/convert_weights.py", "get_mapped_key", "_FROM_HF")
        where = package / ("models/qwen2/_convert_weights.py" if model == "qwen2" else "models/convert_weights.py")
        table = _own(where, "_FROM_HF")["_FROM_HF"]
        set_trainable = _own(package / "modules/peft/_utils.py", "set_trainable_params", nn=mock.MagicMock())
        parameters = dict(_torch_model(model).named_parameters())
        theirs = {name: called["get_mapped_key"](name, table) for name in parameters}
        whole = types.SimpleNamespace(
            named_parameters=lambda: ((theirs[name], parameter) for name, parameter in parameters.items())
        )
        asked = {line.strip() for line in text.splitlines() if not line.startswith("#")}
        set_trainable["set_trainable_params"](whole, asked)
        return {name: one.numel() for name, one in parameters.items() if one.requires_grad}

    def maxtext(self, model: str, text: str) -> dict[str, int]:
        import jax
        import yaml

        given = {"scan_layers": True, **yaml.safe_load(text)}  # the default of configs/base.yml
        mask = _own(self.root / "maxtext/optimizers/optimizers.py", "_get_path_mask_fn", jax=jax)["_get_path_mask_fn"]
        function = {"llama": "LLAMA31", "qwen2": "QWEN"}[model] + "_MAXTEXT_TO_HF_PARAM_MAPPING"
        file = self.root / "maxtext/checkpoint_conversion/utils/param_mapping.py"
        named = _own(file, function)[function](MODELS[model], None, given["scan_layers"])
        sizes = {name: one.numel() for name, one in _torch_model(model).named_parameters()}
        tree: dict[str, Any] = {}
        for key in named:
            *folders, leaf = key.split("-")
            place = tree
            for folder in folders:
                place = place.setdefault(folder, {})
            place[leaf] = key
        frozen = mask(given["trainable_parameters_mask"], match_returns_true=False)
        frozen = frozen(tree) if frozen is not None else jax.tree.map(lambda _: False, tree)
        trained = [key for key, off in zip(jax.tree.leaves(tree), jax.tree.leaves(frozen), strict=True) if not off]
        names = [name for key in trained for name in ([named[key]] if isinstance(named[key], str) else named[key])]
        return {name: sizes[name] for name in names if name in sizes}

    def _tunix(self) -> tuple[Any, dict[tuple[str, ...], str]]:
        """A model of tunix, and by path of its parameters the name in transformers."""
        import jax
        from flax import nnx

        sys.meta_path.append(_Absent("metrax", "grain", "tensorboardX", "wandb", "perfetto", "tunix.generate"))
        for package in ("tunix", "tunix.models"):  # whose own imports are of trainers, not of models
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(self.root / package.replace(".", "/"))]
        from tunix.models.llama3 import model as theirs
        from tunix.models.llama3.params import _get_key_and_transform_mapping

        shape = MODELS["llama"]
        config = theirs.ModelConfig(
            num_layers=shape["num_hidden_layers"],
            vocab_size=shape["vocab_size"],
            embed_dim=shape["hidden_size"],
            hidden_dim=shape["intermediate_size"],
            num_heads=shape["num_attention_heads"],
            head_dim=4,
            num_kv_heads=shape["num_key_value_heads"],
            rope_theta=10000,
            norm_eps=1e-5,
        )
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
        with mesh:
            model = theirs.Llama3(config, rngs=nnx.Rngs(0))
        table = _get_key_and_transform_mapping(config)
        named = {}
        for name in tensors("llama").shapes:
            (path,) = (re.sub(old, new, name) for old, (new, _) in table.items() if re.fullmatch(old, name))
            named[tuple(path.split("."))] = name
        return model, named

    def tunix(self, model: str, text: str) -> dict[str, int]:
        import yaml
        from flax import nnx

        whole, named = self._tunix()
        import qwix

        asked = yaml.safe_load(text)["lora_config"]
        adapted = qwix.apply_lora_to_model(whole, qwix.LoraProvider(**asked), **whole.get_model_input())
        found: dict[str, int] = {}
        for path, one in nnx.to_flat_state(nnx.state(adapted, nnx.LoRAParam)):
            place = tuple(map(str, path))
            # An adapter w_lora_a lies beside its weight w.
            name = named[(*place[:-1], place[-1].rpartition("_lora_")[0])].removesuffix(".weight")
            found[name] = found.get(name, 0) + one[...].size
        return found

    def nnx(self, model: str, text: str) -> dict[str, int]:
        from flax import nnx

        whole, named = self._tunix()
        wanted = eval(text, {"nnx": nnx})
        state = nnx.to_flat_state(nnx.state(whole, wanted))
        return {named[tuple(map(str, path))]: one[...].size for path, one in state}

    def mergekit(self, model: str, text: str) -> dict[str, int]:
        """What stays: mergekit writes a model, whose layers are told by their weights."""
        from safetensors.numpy import load_file

        with tempfile.TemporaryDirectory() as folder:
            source, out = Path(folder, "source"), Path(folder, "out")
            _torch_model(model).save_pretrained(source)
            Path(folder, "slices.yml").write_text(text.replace("MODEL", str(source)).replace('"', ""))
            program = [sys.executable, "-m", "mergekit.scripts.run_yaml", f"{folder}/slices.yml", str(out)]
            done = subprocess.run(program, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(done.stderr.strip().splitlines()[-1])
            before = load_file(source / "model.safetensors")
            after = {name: one for file in out.glob("*.safetensors") for name, one in load_file(file).items()}
        q = "model.layers.{}.self_attn.q_proj.weight"
        found = {}
        for name, one in after.items():
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            if layer:
                mine = after[q.format(layer[1])]
                (origin,) = (old for old in range(12) if (before[q.format(old)] == mine).all())
                name = name.replace(f"layers.{layer[1]}.", f"layers.{origin}.")
            found[name] = one.size
        return found


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives a stand-in for packages that a tool imports and its matching does not use, where they are absent."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self) if name.startswith(self.names) else None

    def create_module(self, spec: Any) -> Any:
        return mock.MagicMock(__path__=[], __spec__=spec)

    def exec_module(self, module: Any) -> None:
        pass


def folded(found: dict[str, int]) -> list[list[Any]]:
    """Layers of like tensors in one: ``[name with {} for the layer, layers, weights]``."""
    groups: dict[tuple[str, int], list[int]] = {}
    for name, size in found.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        key = name.replace(f"layers.{layer[1]}.", "layers.{}.", 1) if layer else name
        groups.setdefault((key, size), []).extend([int(layer[1])] if layer else [])
    return [[key, layers, size] for (key, size), layers in groups.items()]


def unfolded(rows: list[list[Any]]) -> dict[str, int]:
    """What `folded` folds."""
    pairs: Iterator[tuple[str, int]] = (
        (key.format(layer), size) for key, layers, size in rows for layer in (layers or [None])
    )
    return dict(pairs)


def main(root: Path) -> None:
    """Runs every tool on every case and writes the golden file."""
    tools, found = Tools(root), {}
    for fmt, files in cases().items():
        run: Callable[..., dict[str, int]] = getattr(tools, fmt.replace("-", "_"))
        found[fmt] = {}
        for name, case in files.items():
            try:
                answer = {"trains": folded(run(case["model"], case["text"]))}
            except (ValueError, RuntimeError, TypeError) as error:
                answer = {"refused": re.sub(r"/\S+", "...", str(error).splitlines()[0])[:120]}
            print(fmt, name, str(answer)[:150], flush=True)
            found[fmt][name] = {**case, **answer}
    text = json.dumps({"layers": LAYERS, "formats": found}, indent=None, separators=(",", ":"))
    GOLDEN.write_text(re.sub(r'("[^"\\]+":\{"model")', r"\n\1", text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
