"""What comes next after a command, as commands that can be pasted: in the report and below what is printed."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Config = Mapping[str, Any]
Steps = dict[str, str]  # what for: the command

_ROWS = ("template", "edition", "long", "truncate", "duplicates", "split")
_TRAINS = {"mode": "only", "lora_rank": 0, "lora_targets": "", "optimizer": "adamw", "remat": True}
_TRAINS |= dict.fromkeys(("train_embeddings", "train_norms", "train_head"))
_DEFAULTS = {"template": "auto", "edition": "clean", "long": "refuse", "duplicates": "refuse"}


def following(command: str, config: Config, out: str = "") -> Steps:
    """What to do after a command, each with what it is for; empty where nothing follows.

    Args:
        command: name of the command.
        config: its options, as ``config`` of ``run.json`` holds them.
        out: run directory, or what was written; empty for nothing.
    """
    made = _NEXT.get(command)
    return made(config, out) if made else {}


def told(steps: Steps) -> str:
    """Steps as lines for a terminal; a command stays one line, or it could not be pasted."""
    return "\n".join(f"next, to {purpose}:\n  {command}" for purpose, command in steps.items())


def _command(name: str, *values: tuple[str, Any], also: str = "") -> str:
    flags = [f"--{flag}={shlex.quote(str(value))}" for flag, value in values if value not in ("", None)]
    return " ".join(["jaxcrit", name, *flags, *([also] if also else [])])


def _rows(config: Config, data: str = "") -> list[tuple[str, Any]]:
    """Model, rows and how they are rendered, as they were given; the embedded ones by nothing."""
    kept = [(name, config[name]) for name in _ROWS if config.get(name, "") not in ("", _DEFAULTS.get(name))]
    return [("model", config.get("model", "")), ("data", data or config.get("data", "")), *kept]


def _after_analyze(config: Config, out: str) -> Steps:
    select = _command("select", ("scores", out), ("layers", config.get("layers", "critical")), ("format", "peft"))
    if config.get("states"):
        return {"name the layers to another trainer": select}
    train = _rows(config)
    return {
        "train these layers": _command("finetune", *train, ("layers", f"@{out}"), ("out", f"{out}-tuned")),
        "name them to another trainer": select,
        "test whether the score says where training matters": _command(
            "finetune", *train, ("layers", "all"), ("out", f"{out}-all")
        ),
    }


def _after_finetune(config: Config, out: str) -> Steps:
    steps = {"load it elsewhere": _command("export", ("run", out), ("out", f"{out}-model"))}
    if config["layers"] == "all":
        test = _rows({**config, "model": ""}, config.get("eval_data") or ("TEST" if config["data"] else ""))
        pair = ("base", config["model"]), ("tuned", out)
        steps["see what each layer's training is worth, on rows it has not seen"] = _command(
            "substitute", *pair, *test, ("max_length", config["max_length"] or ""), ("out", f"{out}-sub")
        )
    return steps


def _after_substitute(_: Config, out: str) -> Steps:
    pair = _command("correlate", ("scores", "ANALYSIS"), ("scores", out))
    return {"compare with a score of the base, ANALYSIS being a run of analyze on it": pair}


def _after_score(_: Config, out: str) -> Steps:
    return {
        "see which criteria agree": _command("correlate", ("all", out), ("out", f"{out}-all")),
        "take the layers of one, KEY being its name": _command("select", ("scores", out), ("layers", "KEY:4")),
    }


def _after_plan(config: Config, _: str) -> Steps:
    names = ["model", "layers", "mesh", "batch_size"] if config["job"] == "finetune" else ["model", "mesh"]
    named = {**config, "model": config["model"] if Path(config["model"]).expanduser().is_dir() else "DIR"}
    given = [(name, named[name]) for name in names]
    if config["job"] == "finetune":
        given += [(name, named[name]) for name, usual in _TRAINS.items() if named.get(name, usual) != usual]
    length = ("max_length", config["length"]) if config["job"] == "finetune" else ("batch_size", config["batch_size"])
    return {"run it there": _command(config["job"], *given, length, ("data", "FILE"))}


def _after_select(config: Config, out: str) -> Steps:
    if config["format"] != "json" or not out:
        return {}
    return {"train these layers": _command("finetune", ("layers", f"@{out}"), also="--model=DIR --data=FILE")}


def _after_export(_: Config, out: str) -> Steps:
    return {"load it in Python": f"transformers.AutoModelForCausalLM.from_pretrained({out!r})"}


def _after_spectrum(config: Config, out: str) -> Steps:
    given = [("model", "DIR"), ("data", "FILE")] if config.get("run") else _rows(config)
    what = ("layers", "critical:1"), ("components", "0"), ("mode", "project")
    return {"take the first component out of a layer": _command("intervene", *given, *what)}


def _after_trace(config: Config, out: str) -> Steps:
    given = ("model", config.get("model", "")), ("facts", "FACTS"), ("covariance_data", "TEXT")
    edit = _command("edit", *given, ("layers", f"@{out}"), ("out", f"{out}-edit"))
    return {"change facts there, FACTS being what to say instead and TEXT rows of any text": edit}


def _after_prune(config: Config, out: str) -> Steps:
    model = f"{out}/model"
    healed = ("model", model), ("data", "FILE"), ("layers", "all"), ("out", f"{out}-healed")
    return {
        "heal it": _command("finetune", *healed),
        "see its answers": _command("generate", *_rows({**config, "model": model})),
    }


def _after_screen(_: Config, out: str) -> Steps:
    return {"take the layers where cohesion rises": _command("select", ("scores", out), ("layers", "cohesion_rise:3"))}


def _analyses(config: Config, _: str) -> Steps:
    return {"find the layers": _command("analyze", *_rows(config, config.get("data") or (config["model"] and "FILE")))}


def _compares(_: Config, out: str) -> Steps:
    pair = _command("correlate", ("scores", "ANALYSIS"), ("scores", out))
    return {"compare with another score, ANALYSIS being a run of analyze": pair}


def _after_reuse(config: Config, out: str) -> Steps:
    pair = [("model", config.get("receiver", "")), ("sender", config.get("sender", ""))]
    rows = [("prefix", config.get("prefix", "")), ("data", config.get("data") or "FILE")]
    use = _command("generate", *pair, ("recompute", f"@{out}/layers.json"), *rows)
    return {"answer from the sender's cache": use, **_compares(config, out)}


def _after_intervene(config: Config, _: str) -> Steps:
    if config["mode"] not in ("paper", "project"):
        return {}
    given, what = _rows(config), ("components", config["components"])
    return {"see it at every layer": _command("intervene", *given, ("layers", "all"), what, ("mode", config["mode"]))}


_NEXT: Mapping[str, Callable[[Config, str], Steps]] = {
    "analyze": _after_analyze,
    "score": _after_score,
    "select": _after_select,
    "inspect": _analyses,
    "data": _analyses,
    "generate": _analyses,
    "spectrum": _after_spectrum,
    "compare": _compares,
    "intervene": _after_intervene,
    "ablate": _compares,
    "screen": _after_screen,
    "trace": _after_trace,
    "plan": _after_plan,
    "finetune": _after_finetune,
    "edit": lambda config, out: {
        "load it elsewhere": _command("export", ("run", out), ("out", f"{out}-model")),
    },
    "substitute": _after_substitute,
    "reuse": _after_reuse,
    "prune": _after_prune,
    "export": _after_export,
}
