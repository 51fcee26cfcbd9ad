"""Hidden states of every layer for every sample: captured here, or by any other engine."""

from __future__ import annotations

import dataclasses
import hashlib
import types
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import jax
import numpy as np
from jax.sharding import Mesh

from jaxcrit.core.errors import UserError
from jaxcrit.core.files import local_path, read_object
from jaxcrit.core.groups import AXES, ENDS
from jaxcrit.core.hashing import sha256_json
from jaxcrit.core.layers import LayerScores
from jaxcrit.core.schema import Size, conform
from jaxcrit.models.families import FAMILIES
from jaxcrit.models.model import Model, open_model
from jaxcrit.parallel.mesh import make_mesh, parse_mesh
from jaxcrit.similarity import DegenerateError

# Behind a final norm without weights all samples have one length. Spread of lengths that is taken for that, and
# how many times wider it must be in the layer before: learned weights leave more, so this finds some, not all.
_ONE_LENGTH, _WIDER = 0.01, 5
_NAMES = "the model is of no family of jaxcrit's: names of layers and weights, in configs/ too, are LLaMA's"
_NORMED = "the last layer is behind the model's final norm: no score looks at it, and CKA shows it as it is"


@dataclasses.dataclass(frozen=True, eq=False)
class HiddenStates:
    """What layers make of samples; of a run it is a dataset.

    Attributes:
        hidden: ``[L, N, D]`` float32; of layer l the residual stream after block l.
        sample_ids: ``[N]`` identity of each sample.
        units: ``[N]`` int, which prompt each sample comes from; None where each is one of its own.
        meta: what was measured on what; kept in every score.
        name: name within a run.
        source: file or directory; ``memory`` where there is none.
        dtype: dtype that the states were kept in.
        normed: whether the last layer's states are those behind the model's final norm.
        notes: what whoever reads the scores must know of these states.
    """

    hidden: jax.Array | np.ndarray
    sample_ids: Sequence[str]
    units: np.ndarray | None = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    name: str = "states"
    source: str = "memory"
    dtype: str = "float32"
    normed: bool = False
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line, for messages of what wants a model."""
        return f"hidden states {np.shape(self.hidden)} of {self.source}"

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return int(self.hidden.shape[0])

    @property
    def num_samples(self) -> int:
        """Number of samples N."""
        return int(self.hidden.shape[1])

    @property
    def position(self) -> str:
        """Which token stands for a prompt; ``all`` where each is a sample, ``given`` where nobody said."""
        return "all" if self.units is not None else self.meta.get("position", "given")

    @property
    def prompt_ids(self) -> list[str]:
        """Identity of each prompt."""
        return list(self.sample_ids if self.units is None else dict.fromkeys(self.sample_ids))

    def describe(self) -> dict[str, Any]:
        """JSON values for ``run.json``; ``hash`` identifies the states themselves, however they are kept."""
        hidden: Any = np.ascontiguousarray(self.hidden)
        facts = {"normed": self.normed, "position": self.position}
        digest = hashlib.sha256(hidden).hexdigest()
        units = None if self.units is None else self.units.tolist()
        whole = {**facts, "hidden": digest, "shape": hidden.shape, "ids": list(self.sample_ids), "units": units}
        kept = {"dtype": self.dtype, "num_layers": self.num_layers, "width": int(hidden.shape[2])}
        counted = {"source": self.source, "num_samples": len(self.prompt_ids)}
        return {**counted, **kept, **facts, "hash": sha256_json(whole)}

    def first(self, count: int) -> HiddenStates:
        """The samples of the first prompts alone."""
        keep = np.flatnonzero((np.arange(self.num_samples) if self.units is None else self.units) < count)
        ids = [self.sample_ids[place] for place in keep.tolist()]
        units = None if self.units is None else self.units[keep]
        return dataclasses.replace(self, hidden=self.hidden[:, keep], sample_ids=ids, units=units)

    def trusted(self, scores: Mapping[str, LayerScores]) -> dict[str, LayerScores]:
        """The scores, invalid where they look at a last layer behind the final norm, which is no state of the stream.

        Args:
            scores: by key; one over a window says so in its meta.
        """

        def one(score: LayerScores) -> LayerScores:
            last = self.num_layers - 1 - int(score.meta.get("window", 1)) // 2
            valid = score.valid & (np.arange(score.num_layers) < last)
            stderr = None if score.stderr is None else np.where(valid, score.stderr, np.nan)
            return dataclasses.replace(score, values=np.where(valid, score.values, np.nan), valid=valid, stderr=stderr)

        return {key: one(score) for key, score in scores.items()} if self.normed else dict(scores)


@dataclasses.dataclass(frozen=True, eq=False)
class GivenModel:
    """The model that given states come from, as far as it is known; stands where a run asks for a `Model`.

    Attributes:
        config: family (None where unknown), depth and width, in the words of `ModelConfig`.
        model_hash: identity; None where unknown.
        mesh: devices that the statistics are computed on.
        dtype: dtype that the states were kept in.
        path: what the model was called; empty where unknown.
        notes: what whoever reads the scores must know of it.
    """

    config: Any
    model_hash: str | None
    mesh: Mesh
    dtype: str
    path: str = ""
    notes: tuple[str, ...] = ()

    @property
    def short_name(self) -> str:
        """Name for a directory."""
        return "states"

    def describe(self) -> dict[str, Any]:
        """JSON values for ``run.json``."""
        shape = {"num_layers": self.config.num_layers, "width": self.config.width, "dtype": self.dtype}
        return {"path": self.path, "hash": self.model_hash, "family": self.config.family, **shape}

    @property
    def facts(self) -> dict[str, Any]:
        """JSON values for the meta of scores: which model, as far as it is known."""
        return {"model_type": self.config.family, "model_hash": self.model_hash}

    def settled(self, options: Any) -> dict[str, Any]:
        """What options come to: nothing is rendered, and states have a dtype already."""
        return {"dtype": self.dtype}

    def machine(self) -> dict[str, Any]:
        """JSON values for ``run.json``: devices and mesh."""
        device = jax.devices()[0]
        devices = {"kind": device.device_kind, "platform": device.platform, "mesh": dict(self.mesh.shape)}
        return {"devices": devices}


def states_from(
    array: Any,
    *,
    axes: str,
    ends: str = "blocks",
    sample_ids: Sequence[str] | None = None,
    units: Sequence[int] | None = None,
    model_hash: str | None = None,
    **facts: Any,
) -> HiddenStates:
    """Hidden states from an array of any engine; nothing is guessed.

    Args:
        array: three-dimensional array of floats (numpy, jax, or what numpy can read).
        axes: what its axes are, in order: ``l`` layers, ``n`` samples, ``d`` width; ``lnd`` or ``nld``, say.
        ends: what its layers are: ``blocks``, what leaves each block; ``embed``, the embedding output in front,
            which is left out; ``normed``, at the end what leaves the final norm, which no score looks at; or
            ``embed,normed``, as `output_hidden_states` of transformers is.
        sample_ids: identity of each sample, by which two runs know the samples they share; ``0``, ``1``, ... where none
            are given.
        units: which prompt each sample comes from, where several samples come from one.
        model_hash: identity of the model, where it is known.
        **facts: further fields of `HiddenStates`.

    Raises:
        UserError: not three dimensions, axes that are not these three letters, fewer than 4 samples, identities of
            another number or given twice, NaN or infinity, a layer in which all samples are the same, or a last layer
            that is behind a final norm and was not said to be.
    """
    if sorted(axes) != sorted(AXES[0]):
        raise UserError(f"--axes={axes!r}: expected l (layers), n (samples) and d (width) in the order of the array")
    if ends not in ENDS:
        raise UserError(f"--ends={ends!r}: expected {' or '.join(ENDS)}")
    values = array if isinstance(array, jax.Array) else np.asarray(array)
    if values.ndim != 3:
        raise UserError(f"expected an array of three dimensions, layers, samples and width; got shape {values.shape}")
    if not jax.numpy.issubdtype(values.dtype, jax.numpy.floating):
        hint = "; numpy's files know no bfloat16: save float32" * (values.dtype.kind == "V")
        raise UserError(f"expected an array of floats, got {values.dtype}{hint}")
    kept = values.transpose([axes.index(axis) for axis in AXES[0]])["embed" in ends :]
    hidden = kept.astype(np.float32)
    layers, samples, width = hidden.shape
    if not layers or not width:
        raise DegenerateError(f"expected a layer and a dimension or more, got {layers} and {width} (axes={axes!r})")
    dtype = facts.pop("dtype", str(kept.dtype))
    if samples < 4:
        raise DegenerateError(f"expected at least 4 samples, got {samples} (axes={axes!r}); give more prompts")
    for layer in range(layers):
        one = np.asarray(hidden[layer])
        if not np.isfinite(one).all():
            raise DegenerateError(f"layer {layer}: {_infinite(one, dtype)}", [layer])
        if (one == one[0]).all():
            raise DegenerateError(f"layer {layer}: all {samples} samples are the same; nothing to compare", [layer])
    before, last = (_spread(np.asarray(hidden[layer])) for layer in (-min(layers, 2), -1))
    if "normed" not in ends and last < min(_ONE_LENGTH, before / _WIDER):
        raise UserError(
            f"layer {layers - 1}: all samples have one length, within {last:.2%} ({before:.0%} in the layer before), as"
            " behind the model's final norm; take what leaves the last block, or say so with"
            f" --ends={'embed,' if ends == 'embed' else ''}normed"
        )
    names = [str(number) for number in range(samples)] if sample_ids is None else [str(one) for one in sample_ids]
    for what, given in (("sample_ids", names), ("units", units)):
        if given is not None and len(given) != samples:
            raise UserError(f"--{what}: expected {samples} of them, one for each sample; got {len(given)}")
    # Numbers of prompts in the order they come in.
    order = None if units is None else np.unique(np.asarray(units), return_index=True, return_inverse=True)
    places = None if order is None else np.argsort(np.argsort(order[1]))[order[2]]
    pairs = set(zip(names, range(samples) if places is None else places.tolist(), strict=True))
    name, times = Counter(name for name, _ in pairs).most_common(1)[0]
    if times > 1:
        raise UserError(f"--sample_ids: expected each once, got {name!r} for {times} prompts; remove the duplicates")
    meta = {**({} if model_hash is None else {"model_hash": model_hash}), **facts.pop("meta", {})}
    normed = "normed" in ends
    notes = (*facts.pop("notes", ()), *([_NORMED] if normed else []))
    return HiddenStates(hidden, names, places, meta, dtype=dtype, normed=normed, notes=notes, **facts)


def _spread(values: np.ndarray) -> float:
    """How much the lengths of samples ``[N, D]`` differ, relative to their mean."""
    lengths = np.sqrt(np.einsum("nd,nd->n", values, values, dtype=np.float64))
    return float(lengths.std() / lengths.mean())


def _infinite(values: np.ndarray, dtype: str) -> str:
    if dtype == "float16" and not np.isnan(values).any():
        return f"{np.isinf(values).sum()} infinite values: float16 ends at 65,504; capture in bfloat16 or float32"
    return "NaN or infinite values; the states are damaged"


def model_of(states: Sequence[HiddenStates], model: str | Model, mesh: str) -> GivenModel:
    """The model that states come from: the one that is named, else what the states say themselves.

    Args:
        states: states by dataset.
        model: name of the model, or a `Model`; empty where it is not at hand.
        mesh: mesh as ``--mesh`` has it.

    Raises:
        UserError: the states are of models of several shapes, or of another than the one named.
    """
    first = states[0]
    layers, _, width = first.hidden.shape
    shape = types.SimpleNamespace(family=first.meta.get("model_type"), num_layers=layers, width=width)
    dtype = next((one.dtype for one in states if one.dtype != "float32"), "float32")
    found, said = GivenModel(shape, first.meta.get("model_hash"), make_mesh(parse_mesh(mesh)), dtype), first.source
    try:
        opened = open_model(model, mesh=mesh) if model else None
    except UserError as error:
        why = f"jaxcrit does not open --model={model}, whose depth and width alone are checked: {error}"
        found = dataclasses.replace(found, config=_sizes(str(model), error), path=str(model), notes=(why,))
    else:
        if opened is not None:
            found = GivenModel(opened.config, opened.model_hash, opened.mesh, dtype, opened.describe()["path"])
    if found.path:
        said = f"--model={found.path}"
    if found.config.family not in FAMILIES:
        found = dataclasses.replace(found, notes=(*found.notes, _NAMES))
    for one in states:
        for what, ours, theirs in (
            ("layers", found.config.num_layers, one.num_layers),
            ("dimensions", found.config.width, np.shape(one.hidden)[2]),
        ):
            if ours != theirs:
                embed = what == "layers" and theirs == ours + 1
                more = "; is the first the embedding output? then say --ends=embed" * embed
                raise UserError(f"{one.source}: states of {theirs} {what}, but {said} has {ours}{more}")
        other = one.meta.get("model_hash")
        if other and found.model_hash and other != found.model_hash:
            raise UserError(f"{one.source}: states of model {other[:12]}, but {said} has hash {found.model_hash[:12]}")
    return found


def _sizes(model: str, error: UserError) -> Any:
    """Family, depth and width that config.json of a directory tells; the error of whoever asked where it does not."""
    file = local_path(model, "model") / "config.json"
    try:
        content = read_object(file, "a config.json")
        content = conform(content.get("text_config", content), AnyModel, str(file))
        sizes = [next(content[key] for key in keys if key in content) for keys in _SIZES]
        layers, width = conform(sizes, list[Size], str(file))
        return types.SimpleNamespace(family=content["model_type"], num_layers=layers, width=width)
    except (OSError, UserError, StopIteration):
        raise error from None


class AnyModel(TypedDict):
    """What every ``config.json`` says."""

    model_type: str


_SIZES = (("num_hidden_layers", "n_layer", "num_layers"), ("hidden_size", "n_embd", "d_model"))
