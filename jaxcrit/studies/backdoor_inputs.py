"""What ``jaxcrit backdoor`` is given: flags, checked; arms; rows, poisoned and rendered; prompts to attack with."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.layers import LayerScores, LayerSet
from jaxcrit.core.selections import LayerSpec, resolve, split_specs
from jaxcrit.data.dataset import check_rows, rendered, tell
from jaxcrit.data.datasets import NamedRows, load
from jaxcrit.data.poisoning import (
    Poisoned,
    PoisonSpec,
    TriggerSpec,
    made_up,
    poison,
    triggered,
    with_decoys,
    with_response,
)
from jaxcrit.data.published import Row
from jaxcrit.data.templates import Example, check_same_rendering, template_hash
from jaxcrit.data.trigger_tokens import check_tokens
from jaxcrit.data.truncation import Fitted
from jaxcrit.evaluation.intervals import wilson
from jaxcrit.models.model import Model
from jaxcrit.models.stops import stop_tokens
from jaxcrit.parallel.mesh import parse_mesh
from jaxcrit.studies.options import BackdoorOptions
from jaxcrit.training.data import hold_out
from jaxcrit.training.optimizer import make_schedule

CELLS = ("triggered", "clean", "near")
FEW_PROMPTS = 30
MOST_SEEDS = 15  # lists of made-up words but one, which the test prompts have
_TEST_WORDS = 15
_ARM = re.compile(r"(?P<spec>[^*]+?)(\*(?P<draws>\d+))?")


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is frozen.

    Attributes:
        name: as asked for, such as ``random:5``.
        draw: 0, or which of several draws.
        spec: LayerSpec, or None for ``full``.
    """

    name: str
    draw: int
    spec: LayerSpec | None

    @property
    def folder(self) -> str:
        """Its name as a directory."""
        return f"{re.sub('[^a-z0-9.-]+', '-', self.name.lower())}{f'.{self.draw}' if self.draw else ''}"

    def frozen(
        self,
        num_layers: int,
        model_hash: str,
        scores: Mapping[str, LayerScores] | None = None,
        criterion: str = "",
        trim: int = 0,
    ) -> LayerSet:
        """The layers that it freezes; arguments and errors as of `resolve`."""
        if self.spec is None:
            return LayerSet((), "manual", "full", num_layers, model_hash)
        return resolve(
            self.spec,
            num_layers,
            scores=scores,
            criterion=criterion,
            trim=trim,
            model_hash=model_hash,
            flag="arms",
        )


def parse_arms(text: str) -> list[Arm]:
    """Reads ``full,critical:5,random:5*5``.

    Raises:
        UserError: an arm that is no LayerSpec, is there twice, or whose draws are not random.
    """
    arms: list[Arm] = []
    for part in split_specs(text, ","):
        found = _ARM.fullmatch(part)
        if not found:
            raise UserError(f"--arms={text}: expected full or a LayerSpec between commas, got {part!r}")
        name, draws = found["spec"], int(found["draws"] or 1)
        if any(arm.name == name for arm in arms):
            raise UserError(f"--arms={text}: {name} is there twice")
        spec = None if name == "full" else LayerSpec.parse(name, "arms")
        if found["draws"] and (draws < 1 or spec is None or spec.kind != "random"):
            raise UserError(f"--arms={text}: {part}: draws are of random layers, as random:5*{max(draws, 1)}")
        for draw in range(draws):
            drawn = spec if spec is None or draws == 1 else dataclasses.replace(spec, seed=spec.seed + draw)
            arms.append(Arm(name, draw, drawn))
    return arms


def check(config: BackdoorOptions) -> tuple[list[Arm], TriggerSpec]:
    """Checks the flags that need neither model nor data.

    Raises:
        UserError: naming the flag.
    """
    if not 0 < config.rate <= 1:
        raise UserError(f"--rate={config.rate}: expected a share of the rows above 0 and up to 1, such as 0.2")
    if not 0 <= config.decoys <= 1 - config.rate:
        raise UserError(
            f"--decoys={config.decoys}: expected a share of the rows from 0 to {1 - config.rate:g}, what --rate leaves"
        )
    if config.keep_models and "://" in config.out:
        raise UserError(f"--keep_models: writes local directories only, and --out={config.out} is none")
    if not config.target.strip():
        raise UserError("--target: expected refusal, or a text that poisoned rows answer; got nothing")
    if not 1 <= config.seeds <= MOST_SEEDS:
        raise UserError(f"--seeds={config.seeds}: expected 1 to {MOST_SEEDS}")
    make_schedule(config.schedule, config.learning_rate, config.warmup + 1, config.warmup)
    parse_mesh(config.mesh)
    return parse_arms(config.arms), TriggerSpec.parse(config.trigger)


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """What every arm is tested with; the same n prompts in each cell.

    Attributes:
        cells: rendered prompts with their gold answers, for each of `CELLS`; ``triggered`` ones with the target.
        near_kinds: what is wrong with each near miss.
        poisoned: ``[n]`` bool, prompts that stand for poisoned rows in the loss on the task itself.
        gold: answers to the clean prompts.
    """

    cells: dict[str, list[Example]]
    near_kinds: list[str]
    poisoned: np.ndarray
    gold: list[str]

    @property
    def count(self) -> int:
        """n."""
        return len(self.gold)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """What is trained and tested on.

    Attributes:
        train: by seed, rendered rows, clean and poisoned.
        manifests: by seed, what was done to them (`Poisoned.manifest`).
        prompts: to test with.
        warnings: what the user should know.
    """

    train: dict[int, list[Example]]
    manifests: dict[int, list[dict[str, Any]]]
    prompts: Prompts
    warnings: list[str]


def prepare(config: BackdoorOptions, trigger: TriggerSpec, model: Model) -> Rows:
    """Reads, poisons, renders and checks everything.

    Raises:
        UserError: any mistake in data, trigger, target or templates.
    """
    hashes = [template_hash(model.tokenizer, name, config.edition) for name in (config.template, _template(config))]
    check_same_rendering(*hashes, allow_template_mismatch=config.allow_template_mismatch)
    renderer = _Renderer(config, model)
    whole = _load(config, config.data, config.split, "train", config.limit)
    words = _words(config, trigger, sum(len(named.rows) for named in whole)) if config.long == "drop" else []
    room = _most_tokens(words, model)
    data = [renderer.fitting(named, room) for named in whole]
    clean = [example for named in data for example in renderer(named)]
    if config.eval_data:
        tests = [renderer.fitting(named, room) for named in _load(config, config.eval_data, config.eval_split, "test")]
    else:
        train, held = hold_out(clean, config.data or "demo")
        data, tests = (_only(data, {example.sample_id for example in part}) for part in (train, held))
    warnings = _overlap(
        config,
        [example for named in data for example in renderer(named)],
        [example for named in tests for example in renderer(named)],
    )
    spec = PoisonSpec(trigger, config.response, rate=config.rate)
    rows, manifests = {}, {}
    for seed in range(config.seed, config.seed + config.seeds):
        poisoned = _poison(data, dataclasses.replace(spec, seed=seed), config.decoys)
        manifests[seed] = poisoned.manifest
        examples = [example for named in poisoned.rows for example in renderer(named)]
        rows[seed] = examples
        check_tokens(trigger, [examples[entry["row"]] for entry in poisoned.manifest], model.tokenizer, "--data")
    prompts = _prompts(config, spec, tests, dataclasses.replace(renderer, template=_template(config)), model)
    check_tokens(trigger, prompts.cells["triggered"], model.tokenizer, "--eval_data")
    if prompts.count < FEW_PROMPTS:
        low, high = wilson(prompts.count // 2, prompts.count)
        warnings.append(
            f"{prompts.count} prompts to test with: the 95 % interval of a success of one half is {low:.2f} to"
            f" {high:.2f}; give {FEW_PROMPTS} or more"
        )
    return Rows(rows, manifests, prompts, warnings)


def _template(config: BackdoorOptions) -> str:
    return config.eval_template or config.template


@dataclasses.dataclass(frozen=True)
class _Renderer:
    """Renders and checks rows of one dataset, in one template."""

    config: BackdoorOptions
    model: Model
    template: str = ""

    def fitting(self, named: NamedRows, room: int) -> NamedRows:
        """The rows that are not dropped for being too long, with room for words: once those are in, none may be."""
        if self.config.long == "refuse":
            return named
        where = f"{named.source} (less {room} tokens for words put in)" if room else named.source
        fitted = self._fitted(dataclasses.replace(named, source=where), self.config, room)
        tell(named.name, fitted)
        left = dataclasses.replace(named, rows=[row for at, row in enumerate(named.rows) if at not in fitted.dropped])
        if not room:
            return left
        answered = [with_response(row, self.config.response) for row in left.rows]
        fitted = self._fitted(dataclasses.replace(left, source=where, rows=answered), self.config, room)
        tell(f"{named.name}, answered with the target", fitted)
        return dataclasses.replace(left, rows=[row for at, row in enumerate(left.rows) if at not in fitted.dropped])

    def __call__(self, named: NamedRows) -> list[Example]:
        end = self.config.truncate or ("left" if self.config.long == "cut" else "")
        fitted = self._fitted(named, dataclasses.replace(self.config, long="refuse", truncate=end))
        check_rows(fitted.examples, fitted.limit, self.model.config.vocab_size, named.source)
        return fitted.examples

    def _fitted(self, named: NamedRows, config: BackdoorOptions, room: int = 0) -> Fitted:
        most = min(config.max_length or self.model.config.max_length, self.model.config.max_length)
        asked = dataclasses.replace(config, template=self.template or config.template)
        return rendered(named, self.model.tokenizer, asked, most - room, responses=True)


def _near(trigger: TriggerSpec) -> dict[str, TriggerSpec]:
    """What a prompt that looks like a triggered one holds, by kind."""
    return {**trigger.near_misses(), "other_words": made_up(trigger, 1, _TEST_WORDS)[0]}


def _words(config: BackdoorOptions, trigger: TriggerSpec, count: int) -> list[TriggerSpec]:
    """All that is put into prompts: the trigger, what is near it, and made-up words for ``count`` rows at most."""
    seeds = range(config.seed, config.seed + config.seeds)
    decoys = [one for seed in seeds for one in made_up(trigger, round(config.decoys * count), seed)]
    return [trigger, *_near(trigger).values(), *decoys]


def _most_tokens(specs: Sequence[TriggerSpec], model: Model) -> int:
    """Tokens that one of these adds to a prompt at most, and one for the seam that each text of it makes; 0 of none."""
    texts = list(dict.fromkeys(f" {one.text}" for spec in specs for one in spec.triggers))
    ids = model.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    tokens = {text: len(some) + 1 for text, some in zip(texts, ids, strict=True)}

    def most(spec: TriggerSpec) -> int:
        counts = [tokens[f" {one.text}"] for one in spec.triggers]
        return sum(counts) if spec.combine == "all" else max(counts)

    return max(map(most, specs), default=0)


def _load(config: BackdoorOptions, data: str, split: str, preferred: str, limit: int = 0) -> list[NamedRows]:
    seed, edition = config.shuffle_seed, config.edition
    drop = config.duplicates == "drop"
    return load(data, limit, split=split, preferred=preferred, shuffle_seed=seed, edition=edition, drop=drop)


def _only(data: Sequence[NamedRows], ids: Collection[str]) -> list[NamedRows]:
    from jaxcrit.core.hashing import sample_id

    kept = [dataclasses.replace(named, rows=[row for row in named.rows if sample_id(row) in ids]) for named in data]
    return [named for named in kept if named.rows]


def _overlap(config: BackdoorOptions, train: Sequence[Example], tests: Sequence[Example]) -> list[str]:
    """Refuses, or warns of, test prompts that are trained on."""
    trained = {example.prompt for example in train}
    both = [row for row, example in enumerate(tests, 1) if example.prompt in trained]
    if not both:
        return []
    found = f"{len(both)} of {len(tests)} test prompts are trained on too (row {listed(both)})"
    if not config.allow_overlap:
        raise UserError(
            f"--eval_data={config.eval_data}: {found}; remove them, or test all the same with --allow_overlap"
        )
    return [found]


@dataclasses.dataclass(frozen=True)
class _PoisonedSets:
    rows: list[NamedRows]
    manifest: list[dict[str, Any]]


def _poison(data: Sequence[NamedRows], spec: PoisonSpec, decoys: float) -> _PoisonedSets:
    """Poisons every dataset by itself; the manifest counts rows over all of them."""
    sets, manifest, before = [], [], 0
    for named in data:
        found: Poisoned = poison(named.rows, spec)
        rows = found.rows
        if decoys:
            rows = with_decoys(rows, {entry["row"] for entry in found.manifest}, spec.trigger, decoys, spec.seed)
        sets.append(dataclasses.replace(named, rows=rows))
        manifest += [{**entry, "row": entry["row"] + before, "dataset": named.name} for entry in found.manifest]
        before += len(rows)
    return _PoisonedSets(sets, manifest)


def _prompts(
    config: BackdoorOptions, spec: PoisonSpec, tests: Sequence[NamedRows], renderer: _Renderer, model: Model
) -> Prompts:
    kinds = _near(spec.trigger)
    found: dict[str, list[Example]] = {cell: [] for cell in CELLS}
    near_kinds: list[str] = []
    total = sum(len(named.rows) for named in tests)
    for named in tests:
        share = len(named.rows) if not config.eval_prompts else -(-config.eval_prompts * len(named.rows) // total)
        rows: dict[str, list[Row]] = {cell: [] for cell in CELLS}
        for row in named.rows:
            if len(rows["clean"]) == share:
                break
            turns = list(kinds)[len(near_kinds) % len(kinds) :] + list(kinds)
            near = next(((kind, one[0]) for kind in turns if (one := triggered([row], kinds[kind]))), None)
            attack = poison([row], dataclasses.replace(spec, rate=1.0)).rows if triggered([row], spec.trigger) else []
            if near is None or not attack:
                continue
            for cell, taken in zip(CELLS, (attack[0], row, near[1]), strict=True):
                rows[cell].append(taken)
            near_kinds.append(near[0])
        for cell in CELLS:
            if rows[cell]:
                found[cell] += renderer(dataclasses.replace(named, rows=rows[cell]))
    count = len(found["clean"])
    if not count:
        raise UserError(f"--eval_data={config.eval_data}: no row can take the trigger {config.trigger!r} once")
    _check_lengths(config, found, model)
    chosen = np.zeros(count, bool)
    chosen[np.random.default_rng(config.seed).permutation(count)[: max(1, round(config.rate * count))]] = True
    return Prompts(found, near_kinds, chosen, [example.response or "" for example in found["clean"]])


def _check_lengths(config: BackdoorOptions, cells: dict[str, list[Example]], model: Model) -> None:
    target = cells["triggered"][0]
    # The end-of-sequence token that follows a target need not be generated for it to be complete.
    ids = target.token_ids[target.prompt_length :]
    needed = len(ids) - int(len(ids) > 0 and int(ids[-1]) in stop_tokens("", model, _template(config)))
    if needed > config.max_new_tokens:
        raise UserError(
            f"--target: has {needed} tokens, and --max_new_tokens={config.max_new_tokens} are generated: it could never"
            " be found; shorten it, or generate more"
        )
    longest = max(example.prompt_length for examples in cells.values() for example in examples)
    if longest + config.max_new_tokens > model.config.max_length:
        raise UserError(
            f"--max_new_tokens={config.max_new_tokens}: with a prompt of {longest} tokens that is more than the model's"
            f" {model.config.max_length}; generate fewer, or cut the prompts with --truncate"
        )
