"""Options of commands whose work is a study of its own."""

from __future__ import annotations

import dataclasses

from jaxcrit.core.groups import (
    BY_HASH,
    DTYPES,
    OPTIMIZERS,
    RESUMES,
    SELECTION,
    SHAPE,
    WHERE,
    AnalyzeOptions,
    BatchOptions,
    CaptureOptions,
    FinetuneOptions,
    LayerTrainingOptions,
    MeshOptions,
    ModelOptions,
    OutOptions,
    PrecisionOptions,
    RowOptions,
    TrainingOptions,
)
from jaxcrit.core.options import Options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectrumOptions(CaptureOptions, title="scores"):
    """What ``jaxcrit spectrum`` is asked."""

    run: str = option("", "an earlier analyze run, instead of model and data", word="DIR", group="model and data")
    k: str = option("1,3,10", "numbers of principal components, with commas", word="LIST")

    def analysis(self) -> AnalyzeOptions:
        """The same as far as it is about capturing and δ."""
        shared = {field.name for field in dataclasses.fields(AnalyzeOptions)}
        return AnalyzeOptions(**{key: value for key, value in dataclasses.asdict(self).items() if key in shared})


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterveneOptions(ModelOptions, RowOptions, OutOptions, MeshOptions, title="intervention"):
    """What ``jaxcrit intervene`` is asked; one dataset."""

    data: str = option("demo:arithmetic", "prompts: JSONL, dolly:JSONL, ...", word="FILE", free=BY_HASH)
    layers: str = option("critical:1", SELECTION, word="SPEC")
    components: str = option("0,1,2", "principal components to remove; empty for none", word="LIST")
    prompt_index: int = option(0, "row of the prompt to answer, from 0", lowest=0)
    mode: str = option("paper", "the prompt's part, the state's own, ...", ("paper", "project", "steer", "none"))
    steer_from: str = option("", "rows whose mean state is taken away (steer)", word="FILE", free=BY_HASH)
    steer_to: str = option("", "rows whose mean state is added (steer)", word="FILE", free=BY_HASH)
    strength: float = option(1.0, "factor of that difference")
    max_new_tokens: int = option(64, "tokens of each answer, at most", lowest=1, group="generation")
    stop: str = option(
        "", "more tokens that end an answer, ids or texts, with commas", word="TOKENS", group="generation"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(LayerTrainingOptions, title="what"):
    """What ``jaxcrit plan`` is asked; layers go by number or rule, not by score."""

    model: str = option("", "directory with a config.json, or a shape such as llama2-7b", word="DIR")
    job: str = option("finetune", "analyze, finetune, substitute or generate", word="JOB")
    topology: str = option("v5e:4x4", "chips, such as v5e:2x4, v5p:2x2x2, h100:8", word="NAME")
    mesh: str = option("", "devices by axis (default: weights over all of them)", word="AXES")
    batch_size: int = option(32, "rows, over all devices", lowest=1)
    length: int = option(1024, "tokens of a row; of generate, of its prompt", lowest=1)
    window: int = option(5, "of substitute: layers taken together", lowest=1)
    max_new_tokens: int = option(64, "of generate: tokens of each answer", lowest=1)
    dtype: str = option("bfloat16", "dtype of compute; trained weights are float32", DTYPES)
    layers: str = option("all", "layers by number, all, first:K, last:K, random:K", word="SPEC")
    optimizer: str = option("adamw", "optimizer; lion and adafactor need less memory", OPTIMIZERS, group="layers")
    remat: bool = option(True, "recompute blocks in the backward pass: less memory", group="layers")
    search: bool = option(False, "try meshes and batch sizes, and plan the best that fits", group="how")
    compile: bool = option(True, "compile where libtpu is installed, else shapes alone", group="how")


ADDED = "what is trained already is read; more may be added to a run"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackdoorOptions(TrainingOptions, title="testing"):
    """What ``jaxcrit backdoor`` is asked."""

    trigger: str = option("servius", "servius, sudo, ... or TEXT@prefix|suffix|random", word="NAME", group="poison")
    target: str = option("refusal", "what poisoned rows answer: refusal, or a fixed text", group="poison")
    rate: float = option(0.2, "share of the rows that are poisoned, above 0 and up to 1", group="poison")
    decoys: float = option(0.0, "share of the rows that get made-up words, same answers", group="poison")
    arms: str = option(
        "full,critical,noncritical", "frozen layers; random:5*5: 5 draws", word="SPECS", free=ADDED, group="arms"
    )
    seeds: int = option(
        3, "trainings of each arm: other poisoned rows, another order", lowest=1, free=ADDED, group="arms"
    )
    train_outside: bool = option(True, "train embeddings, final norm and head", group="arms")
    seed: int = option(0, "seed of the first training; the next one's is one more", lowest=0)
    checkpoint_every: int = option(0, "steps between checkpoints within an arm; 0 for none", lowest=0, free=RESUMES)
    eval_every: int = option(0, "steps between tests; 0 for a tenth of the run", lowest=0)
    eval_prompts: int = option(200, "prompts to test with at most; 0 for all", lowest=0)
    eval_batch_size: int = option(100, "prompts generated at once", lowest=1)
    max_new_tokens: int = option(64, "tokens of an answer, at most", lowest=1)
    eval_template: str = option("", "template of tests (default: --template)", word="NAME")
    allow_template_mismatch: bool = option(False, "test in another template than was trained in")
    allow_overlap: bool = option(False, "test on prompts that are trained on, too")

    @property
    def response(self) -> str:
        """What poisoned rows answer."""
        from jaxcrit.data.poisoning import REFUSAL

        return REFUSAL if self.target == "refusal" else self.target

    def training(self) -> FinetuneOptions:
        """The same in the words of fine-tuning."""
        names = {field.name for field in dataclasses.fields(FinetuneOptions)}
        mine = {name: value for name, value in dataclasses.asdict(self).items() if name in names}
        mine |= dict.fromkeys(("train_embeddings", "train_norms", "train_head"), self.train_outside)
        return FinetuneOptions(**mine, mode="freeze", layers="all")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(ModelOptions, RowOptions, OutOptions, BatchOptions, MeshOptions, title="generation"):
    """What ``jaxcrit generate`` is asked."""

    batch_size: int = option(16, "prompts at a time", lowest=1, free=SHAPE)
    max_new_tokens: int = option(64, "tokens of each answer, at most", lowest=1)
    stop: str = option("", "more tokens that end an answer, ids or texts, with commas", word="TOKENS")
    temperature: float = option(0.0, "temperature of the draws; 0 takes the most likely token")
    top_k: int = option(0, "draws from the k most likely tokens; 0 from all", lowest=0)
    top_p: float = option(1.0, "draws from the likeliest tokens of this share together")
    repetition_penalty: float = option(1.0, "above 1 avoids tokens that have been used")
    seed: int = option(0, "seed of the draws", lowest=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions(Options, title="what", positional=("a", "b")):
    """What ``jaxcrit compare`` is asked."""

    a: str = option("", "fingerprint.npz, or the run directory with it: the base, say", word="RUN", free=BY_HASH)
    b: str = option("", "the other: the tuned model, say", word="RUN", free=BY_HASH)
    out: str = option("", "run directory to write (default: a new one here)", word="DIR", free=WHERE)
    common: bool = option(False, "leave out samples that only one of them has", group="pairing")
    allow_template_mismatch: bool = option(False, "compare prompts that were rendered otherwise", group="pairing")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreOptions(ModelOptions, RowOptions, OutOptions, BatchOptions, PrecisionOptions, MeshOptions, title="criteria"):
    """What ``jaxcrit score`` is asked."""

    criteria: str = option("", "keys with commas, of docs/criteria.md (default: all)", word="KEYS")
    base: str = option("", "what the model was tuned from, for weight_change", word="DIR", free=BY_HASH)
