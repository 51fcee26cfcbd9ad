"""What other trainers make of a file: which tensors train, and how many weights of each, by the rules they document.

Each function takes what a file holds and the tensors of a model, and gives weights by tensor: of a tensor that trains
whole its size, of one with an adapter the adapter's. Names are those of `transformers`
(``model.layers.7.self_attn.q_proj.weight``). The rules are those of the versions in `jaxcrit.reporting.exporters`;
tests hold them to what these versions themselves answered (``tests/goldens/interchange.json``).
"""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, TypedDict

from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.schema import Size
from jaxcrit.reporting.tensors import LAYER, MAXTEXT, TORCHTUNE, TUNIX, Tensors, Trained, layer_of

# Trainers of whole tensors.


class Axolotl(TypedDict, total=False):
    """What is read of axolotl's YAML."""

    unfrozen_parameters: str | list[str] | None
    adapter: str | None


def axolotl(content: Axolotl, tensors: Tensors) -> Trained:
    """A pattern matches from the start of a name; its dots are literal, and so are dots that were escaped before.

    ``[a:b]`` behind a pattern means rows a to b. Without any pattern everything trains.
    """
    if content.get("adapter"):
        raise UserError(f"adapter: {content['adapter']} trains adapters, to which unfrozen_parameters does not apply")
    if not content.get("unfrozen_parameters"):
        return dict(tensors.sizes)
    rows: dict[str, list[tuple[int, int]]] = {}
    for given in _list(content["unfrozen_parameters"]):
        ranged = re.match(r"^(.+)\[([0-9]*)(?::([0-9]*))?\]$", given)
        pattern = _compiled(re.sub(r"\.(?!\+)", r"\\.", ranged[1] if ranged else given))
        for name, shape in tensors.shapes.items():
            if pattern.match(name):
                rows.setdefault(name, []).extend([_rows(ranged, shape[0])] if ranged else [])
    return {name: _covered(spans, tensors.shapes[name]) for name, spans in rows.items()}


def _rows(ranged: re.Match[str], length: int) -> tuple[int, int]:
    low, high = ranged[2], ranged[3]
    begin = int(low or 0)
    end = begin + 1 if high is None and low else int(high or length)
    if not begin < end <= length:
        raise UserError(f"{ranged[0]}: rows {begin} to {end} of {length}")
    return begin, end


def _covered(spans: Sequence[tuple[int, int]], shape: tuple[int, ...]) -> int:
    """Weights of the rows in any of the spans; of all without spans."""
    covered = {row for low, high in spans for row in range(low, high)}
    return (len(covered) if spans else shape[0]) * math.prod(shape[1:])


class Swift(TypedDict, total=False):
    """What is read of ms-swift's YAML."""

    tuner_type: str
    freeze_parameters: str | list[str]
    freeze_parameters_regex: str | None
    freeze_parameters_ratio: float | int
    trainable_parameters: str | list[str]
    trainable_parameters_regex: str | None


def swift(content: Swift, tensors: Tensors) -> Trained:
    """All train; what ``freeze_*`` name does not, by prefix or `re.search`; what ``trainable_*`` name does after all.

    An expression that does not compile is passed over, as ms-swift does with a warning alone.
    """
    if content.get("tuner_type") != "full":
        raise UserError(
            f"tuner_type is {content.get('tuner_type', 'lora (the default)')}: only full reads freeze_parameters and"
            " trainable_parameters"
        )
    ratio = content.get("freeze_parameters_ratio", 0)
    if ratio not in (0, 1):
        raise UserError(f"freeze_parameters_ratio: {ratio}: only 0 and 1 are read here, the share of weights in order")
    frozen = set(tensors.shapes) if ratio == 1 else set()
    frozen |= _named(content.get("freeze_parameters", []), content.get("freeze_parameters_regex"), tensors)
    frozen -= _named(content.get("trainable_parameters", []), content.get("trainable_parameters_regex"), tensors)
    return {name: size for name, size in tensors.sizes.items() if name not in frozen}


def _named(prefixes: str | list[str], expression: str | None, tensors: Tensors) -> set[str]:
    found = {name for name in tensors.shapes if name.startswith(tuple(_list(prefixes)))}
    try:
        pattern = _compiled(expression) if expression is not None else None
    except UserError:
        return found
    return found | {name for name in tensors.shapes if pattern is not None and pattern.search(name)}


class Maxtext(TypedDict, total=False):
    """What is read of maxtext's YAML."""

    trainable_parameters_mask: str | list[str]
    scan_layers: bool


def maxtext(content: Maxtext, tensors: Tensors) -> Trained:
    """`re.search` in the path of a parameter; with ``scan_layers``, the default, all layers are one parameter."""
    scanned = content.get("scan_layers", True)
    names = MAXTEXT.of(tensors, "maxtext", "params/decoder/layers/" if scanned else "")
    patterns = [_compiled(pattern) for pattern in _list(content.get("trainable_parameters_mask", []))]
    return {
        name: tensors.sizes[name]
        for name, path in names.items()
        if not patterns or any(pattern.search(path) for pattern in patterns)
    }


def torchtune(content: str, tensors: Tensors) -> Trained:
    """The names themselves, one a line: ``set_trainable_params`` asks whether a name is in the set."""
    asked = {line.strip() for line in content.splitlines() if not line.startswith("#")}
    return {n: tensors.sizes[n] for n, theirs in TORCHTUNE.of(tensors, "torchtune").items() if theirs in asked}


def nnx(content: str, tensors: Tensors) -> Trained:
    """flax's own filter, made of ``nnx.All``, ``Any``, ``Not``, ``PathContains`` and ``Param``, on tunix's paths.

    Numbers in paths are numbers: ``PathContains('1')`` finds no layer, ``PathContains(1, exact=False)`` 10 too.
    """
    import flax.nnx

    lines = [line for line in content.splitlines() if not line.startswith("#")]
    try:
        with warnings.catch_warnings(action="ignore"):
            (tree,) = ast.parse("\n".join(lines)).body
        asked = flax.nnx.filterlib.to_predicate(_nnx_filter(tree.value if isinstance(tree, ast.Expr) else tree))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise UserError(f"expected one filter such as nnx.All(nnx.Param, nnx.PathContains(3)), got {error}") from None
    names, anything = TUNIX.of(tensors, "tunix"), flax.nnx.Param(0)
    paths = {
        name: tuple(int(one) if one.isdecimal() else one for one in path.split("/")) for name, path in names.items()
    }
    return {name: tensors.sizes[name] for name, path in paths.items() if asked(path, anything)}


def _nnx_filter(node: ast.AST) -> Any:
    """What an expression makes, without running it."""
    import flax.nnx

    if isinstance(node, ast.Call) and (name := _nnx_name(node.func)) in ("All", "Any", "Not", "PathContains"):
        make = (lambda one: ast.literal_eval(one)) if name == "PathContains" else _nnx_filter
        named = {str(one.arg): ast.literal_eval(one.value) for one in node.keywords}
        return getattr(flax.nnx, str(name))(*map(make, node.args), **named)
    if _nnx_name(node) == "Param":
        return flax.nnx.Param
    raise ValueError(f"{ast.unparse(node)[:80] if isinstance(node, ast.expr) else 'a statement'}")


def _nnx_name(node: ast.AST) -> str | None:
    inside = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nnx"
    return node.attr if inside and isinstance(node, ast.Attribute) else None


def search(content: str, tensors: Tensors) -> Trained:
    """`re.search` finds the expression in a name."""
    pattern = _compiled(content.strip())
    return {name: size for name, size in tensors.sizes.items() if pattern.search(name)}


# Trainers of adapters.


class Peft(TypedDict, total=False):
    """What is read of a LoraConfig."""

    peft_type: str
    target_modules: str | list[str] | None
    exclude_modules: str | list[str] | None
    layers_to_transform: int | list[int] | None
    layers_pattern: str | list[str] | None
    modules_to_save: list[str] | None
    rank_pattern: dict[str, Size]
    r: Size
    bias: str
    use_dora: bool
    lora_bias: bool
    target_parameters: list[str] | None
    trainable_token_indices: Any


# Keys that make further weights train, which are not counted here.
_FURTHER = ("use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "layer_replication")


_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def peft(content: Peft, tensors: Tensors) -> Trained:
    """Adapters on the modules that are named; see `peft_matches` for which these are.

    Of a mixture an expression is replaced by the last names of what it matches, which are those of all layers.

    Raises:
        UserError: what PEFT refuses too (no module, or one that is no linear layer), and keys not counted here.
    """
    layers, pattern = content.get("layers_to_transform"), content.get("layers_pattern")
    text = isinstance(content.get("target_modules"), str)
    if (pattern and not layers) or (text and (pattern or layers is not None)):
        raise UserError("PEFT refuses it: layers_pattern is of layers_to_transform, and both are of a list of modules")
    further = [key for key in _FURTHER if content.get(key)]
    if content.get("peft_type", "LORA") != "LORA" or content.get("bias", "none") != "none" or further:
        raise UserError(f"expected plain LoRA without {', '.join(_FURTHER)} and biases, got {listed(sorted(content))}")
    if content.get("target_modules") is None:
        raise UserError("no target_modules: PEFT takes those of a list by family then; name them")
    match = _own_peft() or peft_matches
    everything = str(content["target_modules"]).lower() == "all-linear"
    if everything:
        content = {**content, "target_modules": [name for name in tensors.linears if name != "lm_head"]}
    elif text and tensors.mixture:
        ends = {name.rpartition(".")[2] for name in [*tensors.modules, *tensors.shapes] if match(content, name)}
        content = {**content, "target_modules": sorted(ends)}
    if tensors.mixture and (everything or any(_ends(name, _EXPERTS) for name in _list(content["target_modules"]))):
        raise UserError(f"adapters on {', '.join(_EXPERTS)} of a mixture go to all layers, and are not counted here")
    found: Trained = {}
    for module in tensors.modules:
        if match(content, module):
            rank = content.get("rank_pattern", {}).get(_pattern_key(content, module), content.get("r", 8))
            if module not in tensors.linears and module != "model.embed_tokens":
                raise UserError(f"PEFT refuses it: {module} is no linear layer")
            found[module] = rank * (tensors.linears.get(module) or sum(tensors.shapes[f"{module}.weight"]))
    if not found:
        raise UserError(f"PEFT refuses it: no module matches target_modules {content['target_modules']!r:.200}")
    for saved in content.get("modules_to_save") or []:
        found |= {name: size for name, size in tensors.sizes.items() if f".{name}".find(f".{saved}.") >= 0}
    return found


def peft_matches(content: Peft, module: str) -> bool:
    """Whether an adapter is put on a module, as ``check_target_module_exists`` says.

    A text is one expression for the whole name. A name of a list is one in full, whatever layers are given, or the end
    of one, within ``layers_to_transform``: of these the first number behind ``layers_pattern`` counts, or behind any
    name.
    """
    targets, excluded = content["target_modules"], content.get("exclude_modules")
    if excluded and (_whole(excluded, module) if isinstance(excluded, str) else _ends(module, excluded)):
        return False
    if any(_match(rf"(^|.*\.){saved}($|\..*)", module) for saved in content.get("modules_to_save") or []):
        return False
    if isinstance(targets, str):
        return _whole(targets, module)
    assert targets is not None
    if module in targets or not _ends(module, targets):
        return module in targets
    layers = content.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = _list(content.get("layers_pattern") or []) or [""]
    places = [rf"(?:^|.*?\.){pattern}\.(\d+)\." if pattern else r".*?\.[^.]*\.(\d+)\." for pattern in patterns]
    found = next((match for place in places if (match := _match(place, module))), None)
    return found is not None and int(found[1]) in (layers if isinstance(layers, list) else [layers])


def _own_peft() -> Callable[[Peft, str], bool] | None:
    """PEFT's own function where it is installed."""
    if not peft_version():
        return None
    import types

    try:
        from peft.tuners.tuners_utils import check_target_module_exists
    except ImportError:  # there, but not what it needs
        return None
    absent = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "target_parameters")

    def matches(content: Peft, module: str) -> bool:
        try:
            config = types.SimpleNamespace(**{**dict.fromkeys(absent), **content})
            return bool(check_target_module_exists(config, module))
        except re.error as error:
            raise UserError(f"PEFT refuses it: no regular expression ({error})") from None

    return matches


def peft_version() -> str:
    """Version of PEFT; empty where it is not installed."""
    try:
        return metadata.version("peft")
    except metadata.PackageNotFoundError:
        return ""


def _pattern_key(content: Peft, module: str) -> str:
    return next((key for key in content.get("rank_pattern", {}) if _match(rf"(.*\.)?({key})$", module)), module)


class Trl(TypedDict, total=False):
    """What is read of TRL's YAML."""

    use_peft: bool
    lora_r: Size
    lora_target_modules: str | list[str] | None
    lora_modules_to_save: list[str] | None


def trl(content: Trl, tensors: Tensors) -> Trained:
    """`peft`, but a list of one is a text, and so an expression; without ``use_peft`` everything trains."""
    if not content.get("use_peft", False):
        return dict(tensors.sizes)
    targets = content.get("lora_target_modules")
    return peft(
        {
            "target_modules": targets[0] if isinstance(targets, list) and len(targets) == 1 else targets,
            "modules_to_save": content.get("lora_modules_to_save"),
            "r": content.get("lora_r", 16),
        },
        tensors,
    )


class Llamafactory(TypedDict, total=False):
    """What is read of LLaMA-Factory's YAML."""

    finetuning_type: str
    lora_target: str | list[str]
    lora_rank: Size
    additional_target: str | list[str] | None
    freeze_trainable_layers: int
    freeze_trainable_modules: str | list[str]
    freeze_extra_modules: str | list[str] | None
    use_llama_pro: bool


def llamafactory(content: Llamafactory, tensors: Tensors) -> Trained:
    """``lora`` is `peft` of the names; ``freeze`` trains names that hold ``.N.`` of the last layers, or of the first.

    A name of ``lora_target`` in full is one module; ``all`` are all linear layers of all layers.
    """
    kind = content.get("finetuning_type", "lora")
    if kind == "full":
        return dict(tensors.sizes)
    if kind == "lora":
        targets = _split(content.get("lora_target", "all"))
        if targets == ["all"]:
            targets = sorted({name.rpartition(".")[2] for name in tensors.linears if name != "lm_head"})
        saved = _split(content.get("additional_target") or [])
        return peft({"target_modules": targets, "r": content.get("lora_rank", 8), "modules_to_save": saved}, tensors)
    if kind != "freeze":
        raise UserError(f"finetuning_type: {kind}: expected lora, freeze or full")
    count, depth = content.get("freeze_trainable_layers", 2), tensors.num_layers
    layers = range(max(0, depth - count), depth) if count > 0 else range(min(-count, depth))
    if content.get("use_llama_pro"):
        if count < 1 or depth % count:
            raise UserError(f"LLaMA-Factory refuses it: {depth} layers do not divide by {count}")
        layers = range(depth // count - 1, depth, depth // count)
    modules = _split(content.get("freeze_trainable_modules", "all"))
    known = {LAYER.sub("", name).split(".")[0] for name in tensors.shapes if layer_of(name) is not None}
    if strange := [name for name in modules if name not in {*known, "all"}]:
        raise UserError(f"LLaMA-Factory refuses it: no module {strange[0]}; there are {', '.join(sorted(known))}")
    parts = [f".{layer}.{'' if name == 'all' else name}" for name in modules for layer in layers]
    parts += _split(content.get("freeze_extra_modules") or [])
    return {name: size for name, size in tensors.sizes.items() if any(part in name for part in parts)}


class TunixLora(TypedDict):
    """Adapters of tunix."""

    module_path: str
    rank: Size


class Tunix(TypedDict):
    """What is read of tunix's YAML."""

    lora_config: TunixLora


def tunix(content: Tunix, tensors: Tensors) -> Trained:
    """qwix's ``module_path`` is one expression for the whole path of a module, with bars in place of dots."""
    asked, found = content["lora_config"], {}
    for name, theirs in TUNIX.of(tensors, "tunix").items():
        module = name.removesuffix(".weight")
        if module in tensors.linears and _whole(asked["module_path"], theirs.rpartition("/")[0]):
            found[module] = asked["rank"] * tensors.linears[module]
    return found


# What leaves layers out; here what stays is what is given.


class Slice(TypedDict):
    """A model's layers in mergekit's YAML."""

    model: Any
    layer_range: list[int]


class Slices(TypedDict):
    """One slice."""

    sources: list[Slice]


class Mergekit(TypedDict):
    """What is read of mergekit's YAML."""

    slices: list[Slices]
    merge_method: str


def mergekit(content: Mergekit, tensors: Tensors) -> Trained:
    """Layers of half-open ranges, in the order given."""
    sources = [one["sources"][0] for one in content["slices"] if len(one["sources"]) == 1]
    ranges = [source["layer_range"] for source in sources]
    plain = len(sources) == len(content["slices"]) and content["merge_method"] == "passthrough"
    if not plain or any(len(ends) != 2 for ends in ranges) or len({str(source["model"]) for source in sources}) != 1:
        raise UserError("expected merge_method: passthrough of slices of one model, each with layer_range: [from, to]")
    if any(not 0 <= low < high <= tensors.num_layers for low, high in ranges):
        raise UserError(f"layer_range is empty, or reaches beyond the {tensors.num_layers} layers that there are")
    kept = [layer for low, high in ranges for layer in range(low, high)]
    if kept != sorted(set(kept)):
        raise UserError("slices repeat or reorder layers, which leaves none out")
    return _kept(kept, tensors)


def llamacpp(content: str, tensors: Tensors) -> Trained:
    """Numbers with commas behind ``--prune-layers``; a number that no layer has is passed over."""
    found = re.search(r"--prune-layers[ =]+(\S+)", content)
    numbers = found[1].split(",") if found else []
    if not numbers or not all(re.fullmatch("[0-9]{1,9}", number) for number in numbers):
        raise UserError("expected --prune-layers with numbers and commas, such as --prune-layers 3,4,5")
    dropped = {int(number) for number in numbers}
    return _kept([layer for layer in range(tensors.num_layers) if layer not in dropped], tensors)


def _kept(layers: Sequence[int], tensors: Tensors) -> Trained:
    inside = tensors.of_layers(layers)
    return {name: size for name, size in tensors.sizes.items() if layer_of(name) is None or name in inside}


def _list(given: Any) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _split(given: Any) -> list[str]:
    return [part.strip() for part in given.split(",")] if isinstance(given, str) else list(given)


def _ends(module: str, names: Sequence[str]) -> bool:
    return module in names or any(module.endswith(f".{name}") for name in names)


def _compiled(expression: str) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of what a later Python may read otherwise
            return re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{expression[:100]!r} is no regular expression ({error})") from None


def _match(expression: str, name: str) -> re.Match[str] | None:
    return _compiled(expression).match(name)


def _whole(expression: str, name: str) -> bool:
    return _compiled(expression).fullmatch(name) is not None
