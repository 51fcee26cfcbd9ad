"""Groups of options that several commands share, each declared once."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from typing import ClassVar, Literal, get_args

from jaxcrit.core.errors import UserError, did_you_mean
from jaxcrit.core.options import Options, option

TEMPLATES = ("auto", "none", "chat", "llama2", "llama3", "phi3")
EDITIONS = ("clean", "paper")
SPLITS = ("train", "val", "test", "all")
LONG = ("refuse", "cut", "drop")
DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "lion", "adafactor", "sgd")
SCHEDULES = ("constant", "linear", "cosine")
AXES = ("lnd", "nld")  # of given states: layers, samples, width
ENDS = ("blocks", "embed", "normed", "embed,normed")
SELECTION = "critical:K, KEY:K, first:K, 3-5,9, @FILE, ..."  # help of --layers; jaxcrit.core.selections
BY_HASH = "what it names is told apart by hash"
WHERE = "says where, not what"
TRACKERS = {"tensorboard": "tensorboardX", "trackio": "trackio", "wandb": "wandb"}  # the library of each
RESUMES = "a run that goes on gives the same bits"
SHAPE = "the same within rounding"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(Options, title="model and data"):
    """Which model."""

    model: str = option("", "checkpoint, hub id, LoRA or finetune run (default: embedded)", word="DIR", free=BY_HASH)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceOptions(Options, title="model and data"):
    """Which rows are read."""

    data: str = option("", "file, dolly:FILE, hub id, ...; with commas (default: embedded)", word="FILE", free=BY_HASH)
    split: str = option("", "split of sets with splits (default: test; to train: train)", word="NAME", free=BY_HASH)
    duplicates: str = option("refuse", "rows that repeat an earlier one", ("refuse", "drop"), free=BY_HASH)
    limit: int = option(0, "first N rows of each dataset only; 0 for all", lowest=0, free=BY_HASH)
    shuffle_seed: int = option(-1, "seed that shuffles rows before --limit; -1 for none", lowest=-1, free=BY_HASH)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactOptions(Options, title="model and data"):
    """Which facts are read; they are completed as plain text."""

    template: ClassVar[str] = "none"
    edition: ClassVar[str] = "clean"

    facts: str = option("", "rows with prompt, subject, target (default: bundled)", word="FILE", free=BY_HASH)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutOptions(Options, title="model and data"):
    """Where a run writes."""

    out: str = option("", "run directory; a run in it goes on (default: a new one)", word="DIR", free=WHERE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RenderingOptions(Options, title="rendering"):
    """How rows become tokens."""

    template: str = option("auto", "auto, none, chat, chat:NAME|FILE, llama2, llama3 or phi3", word="NAME")
    edition: str = option("clean", "the model's template, or the paper's strings", EDITIONS)
    truncate: str = option("", "keep this end of what is too long (default: no cut)", ("left", "right", "paper"))
    long: str = option("refuse", "rows that are too long; cut as --truncate says, or left", LONG)

    def check(self) -> None:
        """Refuses templates that there are not; which chat templates a tokenizer has is not known yet."""
        super().check()
        check_template(self.template)


def check_template(template: str) -> None:
    """Refuses a value of ``--template`` that names none.

    Raises:
        UserError: naming those that there are.
    """
    if template not in TEMPLATES and (not template.startswith("chat:") or template == "chat:"):
        raise UserError(
            f"--template={template}: expected {', '.join(TEMPLATES)}, chat:NAME or chat:FILE, got"
            f" {template!r}{did_you_mean(template, TEMPLATES)}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowOptions(SourceOptions, RenderingOptions):
    """Which rows are read, and how they become tokens; the options of every command that reads data are some."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixOptions(Options, title="rendering"):
    """Which beginning of a prompt another model has read."""

    prefix: str = option("0.8", "what the sender read: a prompt's share or its context", word="SHARE|context")

    def check(self) -> None:
        """Refuses what is neither a share nor the word."""
        super().check()
        _ = self.share

    @property
    def share(self) -> float | None:
        """Share of a prompt's tokens; None up to the end of a row's context.

        Raises:
            UserError: neither a share nor ``context``.
        """
        if self.prefix == "context":
            return None
        with contextlib.suppress(ValueError):
            if 0 < (share := float(self.prefix)) < 1:
                return share
        raise UserError(f"--prefix={self.prefix}: expected context, or a share between 0 and 1 such as 0.8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthOptions(Options, title="rendering"):
    """How long a row may be."""

    max_length: int = option(0, "tokens per row, prompt and response; 0 for the context", lowest=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshOptions(Options, title="machine"):
    """Which devices compute, and in which dtype."""

    dtype: str = option("", "dtype of weights (default: float32 on CPU, else as read)", DTYPES)
    mesh: str = option("", "devices by axis, such as data=4,fsdp=2 (default: by model size)", word="AXES", free=SHAPE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchOptions(Options, title="machine"):
    """How many rows at a time."""

    batch_size: int = option(8, "rows per pass, at most", lowest=1, free=SHAPE)


Sites = Literal["blocks", "attn", "mlp"]  # of a layer: the whole block, or one of its halves
SITES: tuple[str, ...] = get_args(Sites)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TestedRowOptions(RowOptions, OutOptions, LengthOptions, BatchOptions):
    """Which rows with responses a model is tested on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionOptions(Options, title="machine"):
    """How matrix products round."""

    precision: str = option("highest", "precision of matrix products", ("default", "high", "highest"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions(ModelOptions, RowOptions, OutOptions, LengthOptions, title="training"):
    """How a model is trained, for every command that trains."""

    eval_data: str = option(
        "", "rows to test on (default: a tenth of the rows)", word="FILE", free=BY_HASH, group="model and data"
    )
    eval_split: str = option(
        "", "split of --eval_data (default: test)", word="NAME", free=BY_HASH, group="model and data"
    )
    analysis: str = option(
        "", "run of jaxcrit analyze to take or make (default: in --out)", word="DIR", free=WHERE, group="layers"
    )
    steps: int = option(0, "optimizer steps; 0 goes by epochs", lowest=0)
    epochs: int = option(0, "passes over the rows; 0 for one", lowest=0)
    batch_size: int = option(8, "rows per forward and backward pass", lowest=1)
    accumulate: int = option(1, "forward and backward passes per step", lowest=1)
    optimizer: str = option("adamw", "optimizer; lion and adafactor need less memory", OPTIMIZERS)
    learning_rate: float = option(2e-5, "highest learning rate")
    schedule: str = option("constant", "learning rate after the warm-up", SCHEDULES)
    warmup: int = option(0, "steps over which the learning rate rises from 0", lowest=0)
    weight_decay: float = option(0.0, "decay of matrices", lowest=0)
    clip: float = option(0.0, "largest gradient norm; 0 for any", lowest=0)
    router_aux: float = option(0.0, "weight of a mixture's balance loss, as transformers has it", lowest=0)
    seed: int = option(0, "seed of the order of rows, and of adapters", lowest=0)
    eval_every: int = option(0, "steps between tests; 0 for a twentieth of the run", lowest=0, group="while it runs")
    checkpoint_every: int = option(
        0, "steps between checkpoints; 0 for a tenth", lowest=0, free=RESUMES, group="while it runs"
    )
    dtype: str = option("", "dtype of compute; trained weights are float32", DTYPES, group="machine")
    remat: bool = option(True, "recompute blocks in the backward pass: less memory", group="machine")
    mesh: str = option(
        "", "devices by axis, such as data=4,fsdp=2 (default: by model size)", word="AXES", free=SHAPE, group="machine"
    )

    def check(self) -> None:
        """Refuses both a number of steps and a number of epochs."""
        super().check()
        if self.steps and self.epochs:
            raise UserError(f"--steps={self.steps} --epochs={self.epochs}: give one of them")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptureOptions(
    ModelOptions, RowOptions, OutOptions, BatchOptions, PrecisionOptions, MeshOptions, title="capture"
):
    """What is captured, and how δ is computed from it."""

    position: Literal["last", "mean", "all"] = option("last", "token that stands for a prompt", ("last", "mean", "all"))
    normalize: str = option("", "row: every sample's activations to unit length first", ("row",), group="scores")
    kernel: Literal["linear", "rbf"] = option("linear", "kernel of CKA", ("linear", "rbf"), group="scores")
    window: int = option(5, "layers that δ averages over; odd", lowest=3, group="scores")
    include_self: bool = option(True, "count the layer itself in its window", group="scores")
    bias: str = option("debiased", "which δ selects", ("debiased", "biased"), group="selection")
    fingerprint: bool = option(False, "keep whole Grams, beyond 10 MB too", group="capture")

    def check(self) -> None:
        """Refuses an even window, which has no middle."""
        super().check()
        if self.window % 2 == 0:
            raise UserError(f"--window={self.window}: expected an odd number, 3 or more (a layer and its neighbours)")

    @property
    def criterion(self) -> str:
        """Score key that selects."""
        return "delta" if self.bias == "biased" else "delta_debiased"


# What only matters where a model runs on rows.
_OF_A_PASS = [
    *(field.name for kind in (RowOptions, BatchOptions, PrecisionOptions) for field in dataclasses.fields(kind)),
    "dtype",
    "embed",
]
_OF_A_PASS.remove("limit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalyzeOptions(CaptureOptions, title="scores"):
    """What ``jaxcrit analyze`` is asked."""

    states: str = option(
        "",
        "states of any engine, not of rows: FILE or DIR, with commas",
        word="FILE",
        free=BY_HASH,
        group="model and data",
    )
    axes: str = option("", "axes of --states, where these do not say", AXES, free=BY_HASH, group="model and data")
    ends: str = option(
        "", "first and last layer of --states, where these do not say", ENDS, free=BY_HASH, group="model and data"
    )
    embed: bool = option(False, "capture the embedding output too", group="capture")
    save_activations: bool = option(False, "keep activations.safetensors in the run directory", group="capture")
    form: str = option("auto", "form of the sweep", ("auto", "resident", "tiled", "features", "streamed"), word="FORM")
    band: str = option("all", "compute CKA only of layers up to so many apart", word="N|all")
    measures: str = option("", "also procrustes,rsa,rsa_spearman,knn,cca,svcca", word="NAMES")
    layers: str = option("critical", SELECTION, word="SPEC", group="selection")
    trim: int = option(2, "layers at each end that are never critical", lowest=0, group="selection")
    seed: int = option(0, "seed of everything random", lowest=0, group="selection")

    def check(self) -> None:
        """Checks the band, that what is captured besides is kept, and that states come without rows."""
        super().check()
        if self.states:
            given = [name for name in _OF_A_PASS if getattr(self, name) != getattr(type(self)(), name)]
            if given:
                raise UserError(
                    f"--states={self.states}: what a model made of rows already; leave out --{' --'.join(given)}"
                )
            if self.form == "streamed":
                raise UserError("--form=streamed: adds up while a model runs, and --states has none; take another form")
        for name in ("axes", "ends"):
            if getattr(self, name) and not self.states:
                raise UserError(f"--{name}={getattr(self, name)}: is of --states; give them too")
        _ = self.layer_band
        if self.embed and not self.save_activations:
            raise UserError("--embed adds the embedding output to what --save_activations keeps; give both")

    @property
    def layer_band(self) -> int | None:
        """``--band`` as a number; None for all pairs.

        Raises:
            UserError: neither a number nor all, or narrower than the window.
        """
        if self.band == "all":
            return None
        if not self.band.isdecimal():
            raise UserError(f"--band={self.band}: expected all, or a number of layers")
        if int(self.band) < self.window // 2:
            raise UserError(
                f"--band={self.band}: δ of --window={self.window} takes layers up to {self.window // 2} apart; give"
                f" --band={self.window // 2} or more"
            )
        return int(self.band)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerTrainingOptions(Options, title="layers"):
    """Which layers train, and how much of each."""

    layers: str = option("critical", SELECTION, word="SPEC")
    mode: str = option("only", "train only these layers, or freeze these", ("only", "freeze"))
    train_embeddings: bool | None = option(None, "train embeddings (default: with freeze, without adapters)")
    train_norms: bool | None = option(None, "train the final norm (default: as above)")
    train_head: bool | None = option(None, "train the head (default: as above)")
    lora_rank: int = option(0, "train adapters of this rank instead; 0 for none", lowest=0)
    lora_targets: str = option("", "adapters on some of q,k,v,o,gate,up,down (default: all)", word="NAMES")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveOptions(Options, title="objectives"):
    """What a training minimises beside the loss of the responses."""

    supervise: str = option("", "losses of inner layers: 8, 2:logits:FIELD, 2:feature:FIELD, ...", word="LIST")
    supervise_weight: float = option(1.0, "weight of each of them; 0 only measures", lowest=0)
    adversarial: float = option(0.0, "train under changes of embeddings this long: 0.05; 0: no", lowest=0)
    adversarial_on: str = option("states", "what they are to change little", ("states", "loss"))
    adversarial_steps: int = option(3, "steps of the search for them", lowest=1)
    adversarial_weight: float = option(1.0, "weight beside the loss; 0 only measures", lowest=0)

    def check(self) -> None:
        """Refuses options of what is not asked for."""
        super().check()
        for one in ("supervise_weight", "adversarial_on", "adversarial_steps", "adversarial_weight"):
            kind = one.partition("_")[0]
            if not getattr(self, kind) and getattr(self, one) != type(self).__dataclass_fields__[one].default:
                raise UserError(f"--{one}={getattr(self, one)}: is of --{kind}; give that too")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TrainingOptions, LayerTrainingOptions, ObjectiveOptions, title="layers"):
    """What ``jaxcrit finetune`` is asked."""

    layer_rates: str = option("", "factors on the learning rate: 0-7:0.5,8-15:2", word="RATES")
    lora_alpha: float = option(0.0, "adapters count alpha/rank times; 0 for twice the rank", lowest=0)
    reselect: int = option(0, "steps after which --layers are chosen anew; 0 for never", lowest=0)
    gain: str = option("", "gain of a shortcut while it trains, folded in after: 4:attn:0.5", word="L:HALF:G")
    keep: int = option(2, "newest checkpoints kept, besides the best", lowest=1, free=RESUMES, group="while it runs")
    patience: int = option(0, "tests without improvement before it stops; 0 for never", lowest=0, group="while it runs")
    track: str = option(
        "none", "hand metrics on to this tracker", ("none", *TRACKERS), free=WHERE, group="while it runs"
    )
    drift_every: int = option(
        0, "steps between measures of how far each layer has moved", lowest=0, group="while it runs"
    )

    def check(self) -> None:
        """Refuses options of adapters where there are none, what is not re-selected, and a tracker that is missing."""
        super().check()
        for name in ("lora_rank", "layer_rates", "gain", "drift_every"):
            if self.reselect and getattr(self, name):
                raise UserError(
                    f"--reselect={self.reselect}: whole layers of one rate are chosen anew, and what trains is another"
                    f" each time; leave --{name} out"
                )
        for name in ("lora_alpha", "lora_targets"):
            if getattr(self, name) and not self.lora_rank:
                raise UserError(f"--{name}={getattr(self, name)}: is of adapters; give their --lora_rank too")
        if self.track != "none" and "://" in self.out:
            raise UserError(
                f"--track={self.track}: keeps local files in --out, and {self.out} is none; read metrics.jsonl"
            )
        if self.track != "none" and importlib.util.find_spec(TRACKERS[self.track]) is None:
            raise UserError(
                f"--track={self.track}: needs {TRACKERS[self.track]}; pip install 'jaxcrit[{self.track}]', or read"
                " metrics.jsonl"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessOptions(Options, title="processes"):
    """Of every command: the processes of a run, and how programs are compiled."""

    distributed: str = option("auto", "join the other processes of this run", ("auto", "off", "on"), free=SHAPE)
    coordinator: str = option("", "address of process 0, where the cluster does not say", word="HOST:PORT", free=WHERE)
    num_processes: int = option(0, "processes of the run, where the cluster does not say", lowest=0, free=SHAPE)
    process_id: int = option(-1, "number of this process, where the cluster does not say", lowest=-1, free=SHAPE)
    distributed_timeout: int = option(300, "seconds to wait for the others", lowest=1, free=WHERE)
    attention: str = option("auto", "form of attention", ("auto", "reference", "blocks", "cudnn", "splash"), free=SHAPE)
    compilation_cache_dir: str = option(
        "", "where to keep compiled programs, or none (default: cache)", word="DIR|none", free=WHERE
    )
    rehash: bool = option(False, "read all weights for their hash, whatever the cache holds", free=SHAPE)
