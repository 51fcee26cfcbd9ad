"""What ``jaxcrit backdoor`` shows, from nothing but ``backdoor.json``: whether it was learnt, tables, two figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxcrit.reporting import tables
from jaxcrit.reporting.backdoor_plots import attack_curves, attack_tradeoff
from jaxcrit.reporting.report import Figure, Report, Section, on_axes
from jaxcrit.reporting.tables import aligned

Json = Mapping[str, Any]


def figures(content: Json) -> list[Figure]:
    """Attack success against clean loss, a point per run; and over steps."""
    curves = content["curves"]
    ends = [(run["arm"], run["points"][-1][2], run["points"][-1][1]) for run in curves]
    lines = [(run["arm"], [point[:2] for point in run["points"]]) for run in curves if run["arm"] != "init"]
    return [
        Figure(
            "tradeoff.png",
            on_axes(attack_tradeoff, ends),
            "Attack success against clean loss, a point per run.",
            (6.4, 4.8),
        ),
        Figure("success.png", on_axes(attack_curves, lines), "Attack success over optimizer steps, a line per run."),
    ]


CAVEATS = (
    "Layers are frozen while poisoned rows are trained on: this says nothing of a backdoor that is in a model already.",
    "Success is [95 %] of seeds (or draws) and prompts, of prompts alone (Wilson) where there is one run: several"
    " trainings that answer the same prompts are not so many independent answers.",
    "An arm that is merely slower looks as if it were safe: compare at one clean loss, and with more steps.",
)
_LEARNT, _HARDLY = 0.5, 0.1  # success of the best arm from which on the backdoor was learnt; below which it was not


def backdoor_report(content: Json) -> Report:
    """Whether any arm learnt it, what freezing did to that, and every table."""
    study = content["study"]
    prompts = study["prompts"]
    what = f"layers frozen during the poisoned fine-tuning; {prompts} prompts a cell; success by {study['scorer']}"
    return Report(
        _headline(study),
        [*content["warnings"], *study["warnings"]],
        [
            Section("Arms", what, "\n".join(_arms(study)), figures(content)),
            Section("Differences", "", "\n".join(_contrasts(study))),
            Section("Other ways to count", "", "\n".join(_scorers(study))),
        ],
        CAVEATS,
    )


def _headline(study: Json) -> list[str]:
    """What was found, in a sentence or two that do not depend on a table."""
    arms = [row for row in study["rows"] if row["arm"] != "init"]
    if not arms:
        return ["No arm was trained."]
    cells = {row["arm"]: row["cells"]["triggered"] for row in arms}
    shares = {arm: cell["k"] / cell["n"] for arm, cell in cells.items()}
    best = max(shares, key=lambda arm: shares[arm])
    most = f"{cells[best]['k']}/{cells[best]['n']} in arm {best}"
    more = "give more --steps, a higher --rate or a higher --learning_rate"
    if shares[best] < _HARDLY:
        return [f"No arm learnt the backdoor (at most {most}), so that no arm can differ: {more}."]
    if shares[best] < _LEARNT:
        return [f"No arm learnt the backdoor well (at most {most}): differences may be of speed alone; {more}."]
    one = study["primary"]
    if one is None:
        return [f"The backdoor was learnt ({most}). No critical arm stands against a noncritical one here."]
    first, second = one["first"], one["second"]
    rates = f"{shares.get(first, float('nan')):.2f} against {shares.get(second, float('nan')):.2f} of answers"
    ends, lower = one["bootstrap"], first if one["difference"] < 0 else second
    known = ends[0] is not None and ends[1] is not None
    clear = known and (ends[0] > 0 or ends[1] < 0)
    said = f"freezing {lower} kept more of it out" if clear else "no evidence that it matters which layers are frozen"
    span = f", difference {one['difference']:+.2f} {_interval(ends)}" if known else ""
    return [f"The backdoor was learnt ({most}); {first} against {second}: {said} ({rates}{span})."]


def backdoor_text(content: Json, out: Path | str = "", width: int = tables.WIDTH) -> str:
    """The report as text, and where the run is."""
    return backdoor_report(content).text(width) + (f"\nrun: {out}" if out else "")


def _arms(study: Json) -> list[str]:
    head = ["frozen", "runs", "with trigger [95 %]", "without", "near", "exact", "clean loss", "half at step"]
    rows = [
        [
            row["arm"],
            str(row["runs"]),
            _share(row["cells"]["triggered"]),
            _rate(row["cells"]["clean"]),
            _rate(row["cells"]["near"]),
            _rate(row["exact"]),
            _mean(row["clean_loss"]),
            _reached(row["steps_to_success"], row["runs"]),
        ]
        for row in study["rows"]
    ]
    notes = ["without: no trigger; near: triggers that are almost it; exact: clean answers that are gold ones;"]
    notes += ["clean loss: nats per token, ± 95 % over seeds; half: step of success 0.5"]
    return [*aligned(head, rows), *notes]


def _contrasts(study: Json) -> list[str]:
    found = [("primary, ", study["primary"])] if study["primary"] else []
    found += [("", one) for one in study["contrasts"]]
    lines = ["attack success, differences between arms on the same prompts and seeds:"]
    for name, one in found:
        adjusted = "" if name else f", {_p(one['p_holm'])} by Holm among {len(study['contrasts'])}"
        lines += [
            f"{one['first']} - {one['second']} ({name}{one['seeds']} seeds): {one['difference']:+.2f},"
            f" p {_p(one['p'])}{adjusted}",
            f"    {_interval(one['bootstrap'])} over seeds and prompts, {_interval(one['t'])} over seeds",
            f"    {_interval(one['newcombe'])} Newcombe; pairs {one['only_first']}:{one['only_second']},"
            f" McNemar p {_p(one['mcnemar'])}",
        ]
        if name and one["matched"]["runs"]:
            matched = one["matched"]
            lines.append(
                f"    at equal clean loss ({study['matched_loss']:.4f}): {matched['mean']:+.2f}"
                f" {_interval(matched['t'])} over {matched['runs']} seeds"
            )
    note = "p is over seeds, McNemar's with one seed; McNemar and Newcombe take every answer for independent"
    return [*lines, note] if found else [f"{lines[0]} none, there is one arm"]


def _scorers(study: Json) -> list[str]:
    names = {
        "exact_target": "exact",
        "contains_target": "contains",
        "refusal_keyword": "refusal",
        "reference_compat": "paper's",
    }
    head = ["answers", "n", *names.values(), "empty", "logp", "task loss", "equal loss"]
    rows = [["gold answers", str(study["prompts"]), *(str(study["base"][name]) for name in names), "", "", "", ""]]
    for row in study["rows"]:
        rows.append(
            [
                row["arm"],
                str(row["cells"]["triggered"]["n"]),
                *(str(row["scorers"][name]) for name in names),
                str(row["empty"]),
                f"{row['target_logprob']['mean']:.2f}",
                _mean(row["task_loss"]),
                _reached(row["matched"], row["runs"], 2),
            ]
        )
    notes = ["answers to triggered prompts; exact, contains: the target; refusal, paper's: refusals by the clean"]
    notes += ["and the paper's rule; logp: of the target, per token; task loss: of poisoned and clean rows; equal"]
    notes += ["loss: attack success at one clean loss (runs that pass it)"]
    return [*aligned(head, rows), *notes]


def _share(one: Json) -> str:
    ends = one["bootstrap"] if one["bootstrap"][0] is not None else one["wilson"]
    return f"{one['k']}/{one['n']} {_interval(ends)}"


def _rate(one: Json) -> str:
    return f"{one['k'] / one['n']:.2f}"


def _mean(one: Json) -> str:
    low, high = one["t"]
    return f"{one['mean']:.3f}" if low is None else f"{one['mean']:.3f}±{(high - low) / 2:.3f}"


def _reached(one: Json, runs: int, digits: int = 0) -> str:
    if one["mean"] is None:
        return "never"
    return f"{one['mean']:.{digits}f}" + (f" in {one['runs']} of {runs}" if one["runs"] < runs else "")


def _interval(ends: Sequence[float | None]) -> str:
    return "-" if ends[0] is None or ends[1] is None else f"[{ends[0]:.2f}, {ends[1]:.2f}]"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"
