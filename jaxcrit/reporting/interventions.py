"""What ``jaxcrit intervene`` prints: a prompt, its answer before and after, and what was removed."""

from __future__ import annotations

from typing import Any

from jaxcrit.reporting.tables import shortened
from jaxcrit.studies.interventions import INTERVENTION, Intervened

_ANSWERS = ("before", "after")
_WHAT = {
    "paper": "the prompt's part of components {} subtracted at every new token",
    "project": "components {} removed from every state",
    "steer": "{strength:g} x (mean of {steer_to} - mean of {steer_from}) added",
    "none": "nothing removed",
}


def intervention_text(done: Intervened) -> str:
    """The case in lines; prompt and answers as they are."""
    found = done.found
    layers = ", ".join(map(str, found["layers"]))
    what = _WHAT[found["mode"]].format(", ".join(map(str, found.get("components", ()))) or "none", **found)
    lines = [f"warning: {text}" for text in done.warnings]
    lines += [f"prompt {found['prompt_index']}: {found['prompt']}", f"layers {layers}: {what}", ""]
    lines += [f"{name:>6}: {found[name]['text']!r}{'' if found[name]['stopped'] else ' …'}" for name in _ANSWERS]
    lines += ["", f"next token: KL {max(found['next_token_kl'], 0):.3f} nats"]
    lines += [f"{name:>6}: {_likely(found[name]['next_tokens'])}" for name in _ANSWERS]
    lines += ["", *_words(found)] if "lens" in found else []
    return "\n".join([*lines, f"intervention: {done.out / INTERVENTION}"])


def _likely(tokens: list[list[Any]]) -> str:
    return ", ".join(f"{token!r} {probability:.2f}" for token, probability in tokens)


def _words(found: dict[str, Any]) -> list[str]:
    """What every direction is read as, a line for each end."""
    lines = []
    for layer, directions in found["lens"].items():
        names = [f"component {c}" for c in found.get("components", ())] or ["difference"]
        shares = found.get("of", {}).get(layer, ())
        for place, (name, ends) in enumerate(zip(names, directions, strict=True)):
            share = f", {shares[place]:.1%} of the variance" if shares else ""
            lines.append(f"layer {layer} {name}{share}:")
            lines += [shortened(f"  {sign} {' '.join(map(repr, words))}") for sign, words in ends.items()]
    return lines
