"""The registry of criteria: a word for each. The file of that name holds it, and is imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

from jaxcrit.core.errors import UserError, did_you_mean
from jaxcrit.core.options import Options, options_of
from jaxcrit.evidence.criterion import Criterion, Needs, Own

# FILE, or FILE:KEY where the file holds several criteria, or one under another name. A + behind it says that the
# criteria of the file have options of their own; help pages then import the file to list them, and no other.
_WORDS = [
    "delta",
    "delta:delta_debiased",
    "step",
    "step:step_debiased",
    "substitution",
    "ablation:ablation_skip",
    "ablation:ablation_mean",
    "ablation:ablation_skip_greedy",
    "ablation:ablation_mean_greedy",
    "ablation:ablation_skip_choice",
    "ablation:ablation_mean_choice",
    "ablation:ablation_skip_generated",
    "ablation:ablation_skip_number",
    "shortcut:shortcut_loss",
    "shortcut:shortcut_clean",
    "shortcut:shortcut_asr",
    "shortcut:shortcut_selective",
    "shortcut:shortcut_paper",
    "kv_reuse",
    "kv_reuse:kv_distance_keys",
    "kv_reuse:kv_distance_values",
    "trace",
    "trace:trace_last",
    "trace:trace_mlp",
    "trace:trace_attn",
    "trace:trace_recall",
    "weight_snr",
    "stable_rank",
    "weight_change",
    "angular_distance",
    "block_influence",
    "effective_rank",
    "lens_kl",
    "lens_entropy",
    "perturbation_gain+",
    "perturbation_gain:perturbation_gain_wide",
    "perturbation_gain:perturbation_gain_local",
    "cluster_nmi+",
    "cluster_nmi:cluster_step",
    "cohesion_rise",
    "gradient_norm",
    "rgn",
    "fisher",
    "routing_sensitivity",
]
_NAMES = [word.removesuffix("+").partition(":") for word in _WORDS]
FILES: Mapping[str, str] = {key or file: file for file, _, key in _NAMES}
WITH_OPTIONS: tuple[str, ...] = tuple(
    file for word, (file, *_) in zip(_WORDS, _NAMES, strict=True) if word.endswith("+")
)

_EVIDENCE: Mapping[Needs, str] = {
    "weights": "weights",
    "two models": "base and tuned weights",
    "forward": "prompts, forward",
    "backward": "responses, backward",
    "perturbed": "prompts, perturbed",
    "routing": "responses, backward through routers",
    "variants": "responses, changed models",
}
BEGIN, END = "<!-- begin: python -m jaxcrit.criteria FILE writes this table -->", "<!-- end -->"


def criterion(key: str) -> Criterion:
    """The criterion of a key of `FILES`."""
    found: Criterion = importlib.import_module(f"jaxcrit.criteria.{FILES[key]}").CRITERIA[key]
    return found


def scorable() -> dict[str, Criterion]:
    """By key, the criteria that ``score`` computes: all whose evidence no command of its own makes."""
    return {key: one for key in FILES if not (one := criterion(key)).command}


def own_options() -> list[type[Options]]:
    """Options that belong to single criteria; lists them without importing jax."""
    kinds = [
        one.options
        for file in WITH_OPTIONS
        for one in importlib.import_module(f"jaxcrit.criteria.{file}").CRITERIA.values()
    ]
    return [kind for kind in dict.fromkeys(kinds) if kind is not None]


def parse_criteria(text: str, *, two_models: bool) -> dict[str, Criterion]:
    """Criteria of a comma list; an empty one is every criterion, without those of two models where there is one.

    Perturbations, which take some 20 forward passes, must be asked for by name.

    Raises:
        UserError: an unknown key, one that a command of its own computes, or one of two models where there is one.
    """
    known = scorable()
    if not text:
        left = {"perturbed"} | (set() if two_models else {"two models"})
        return {key: one for key, one in known.items() if one.needs not in left}
    found = {}
    for key in (part.strip() for part in text.split(",")):
        if key not in FILES:
            nearest = did_you_mean(key, FILES)
            raise UserError(f"--criteria={key}: expected some of {', '.join(known)}; {_elsewhere()}{nearest}")
        found[key] = one = criterion(key)
        if one.command == "analyze":
            raise UserError(f"--criteria={key}: is computed by jaxcrit analyze, from prompts alone")
        if one.command:
            raise UserError(f"--criteria={key}: is computed by jaxcrit {one.command}; see jaxcrit {one.command} --help")
        if one.needs == "two models" and not two_models:
            raise UserError(f"--criteria={key}: compares a tuned model with its base; give --base=DIR too")
    return found


def _elsewhere() -> str:
    """The criteria that commands of their own compute, by command."""
    keys: dict[str, list[str]] = {}
    for key in FILES:
        if command := criterion(key).command:
            keys.setdefault(command, []).append(key)
    return "; ".join(f"{', '.join(found)} by jaxcrit {command}" for command, found in keys.items())


def of_chosen(chosen: Mapping[str, Criterion], given: Sequence[Options]) -> Own:
    """Options of the chosen criteria by their class: what is given, and defaults.

    Raises:
        UserError: an option was set whose criterion is not chosen.
    """
    wanted = {one.options for one in chosen.values() if one.options is not None}
    for options in given:
        changed = [one for one in options_of(type(options)) if getattr(options, one.field) != one.default]
        if changed and type(options) not in wanted:
            keys = [key for key, one in scorable().items() if one.options is type(options)]
            name, value = changed[0].name, getattr(options, changed[0].field)
            raise UserError(f"--{name}={value}: is an option of {' and '.join(keys)}; name one of them in --criteria")
    return {kind: next((one for one in given if type(one) is kind), kind()) for kind in wanted}


def table() -> str:
    """All criteria as a table in Markdown: what they need, which values are critical, what they see and what not."""
    rows = [
        "| key | needs | critical | formula | source | responds to | blind to |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key in FILES:
        one = criterion(key)
        needs = _EVIDENCE[one.needs] + (f" (`{one.command}`)" if one.command else "")
        cells = [f"`{key}`", needs, one.direction, one.formula, one.source, one.responds, one.blind]
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows)


def updated(text: str) -> str:
    """A text with the table of criteria in it brought up to date.

    Raises:
        UserError: the marks between which it belongs are absent.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"expected the lines {BEGIN} and {END}, between which the table of criteria belongs")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"
