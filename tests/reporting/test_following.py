"""What to do next: commands that parse, with the paths of the run that they follow."""

from __future__ import annotations

import importlib
import re
import shlex

import pytest

from jaxcrit.commands import main as cli
from jaxcrit.core import flags
from jaxcrit.core.groups import ProcessOptions
from jaxcrit.core.options import as_json
from jaxcrit.reporting.following import following, told

MODEL = {"model": "my model", "data": "gsm8k:a b.jsonl", "long": "drop", "template": "chat"}
GIVEN = {"finetune": {"layers": "all"}, "select": {"layers": "first:2"}, "plan": {"layers": "3-5", "mesh": "fsdp=8"}}
GIVEN |= {"reuse": {"sender": "an other", "receiver": "my model"}}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_what_follows_parses_and_names_the_run(command):
    """Quoted paths come back whole; a flag that a command does not have, or a second one, would be refused."""
    module = importlib.import_module(cli.COMMANDS[command][0])
    config = {name: MODEL.get(name, value) for name, value in as_json(module.OPTIONS()).items()}
    steps = following(command, config | GIVEN.get(command, {}), "runs/it is here")
    for line in steps.values():
        if not line.startswith("jaxcrit "):
            assert line == "transformers.AutoModelForCausalLM.from_pretrained('runs/it is here')"
            continue
        _, name, *rest = shlex.split(line)
        kinds = importlib.import_module(cli.COMMANDS[name][0])
        asked, *_ = flags.read([kinds.OPTIONS, ProcessOptions, *cli.further(kinds)], name, rest)
        values = as_json(asked)
        own = [value for value in map(str, values.values()) if "runs/it is here" in value]
        assert own or command in ("inspect", "data", "generate", "spectrum", "intervene", "plan")
        assert values.get("data", "") in ("", MODEL["data"], "TEST", "FILE", "demo:arithmetic")
    shown = told(steps).splitlines()
    assert len(shown) == 2 * len(steps) and all(re.match("next, to .*:$", line) for line in shown[::2])


def test_the_embedded_model_needs_no_names():
    module = importlib.import_module("jaxcrit.commands.analyze")
    (train, *_) = following("analyze", as_json(module.OPTIONS()), "an").values()
    assert train == "jaxcrit finetune --layers=@an --out=an-tuned"


def test_what_was_planned_is_run(capsys):
    """The mesh of the plan, which the job alone would not take, and what trains."""
    asked = "--model=llama3.1-8b --topology=h100:4 --train_embeddings --noremat --optimizer=lion --nocompile"
    assert cli.main(["plan", *asked.split()]) == 0
    told = capsys.readouterr()
    line = next(line for line in (told.out + told.err).splitlines() if line.startswith("  jaxcrit finetune"))
    flags_of = set(shlex.split(line)) & {
        "--mesh=fsdp=4",
        "--train_embeddings=True",
        "--remat=False",
        "--optimizer=lion",
    }
    assert len(flags_of) == 4 and "--train_head" not in line
