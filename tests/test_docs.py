"""What the docs say of the code is what the code says of itself."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shlex
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from support.family_models import raw_config

import jaxcrit
from jaxcrit.commands.main import COMMANDS, further, main
from jaxcrit.commands.reference import options_page
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import write_json
from jaxcrit.core.flags import read
from jaxcrit.core.groups import AnalyzeOptions, ProcessOptions
from jaxcrit.core.options import options_of
from jaxcrit.criteria import registry
from jaxcrit.data import demo
from jaxcrit.models import config, families
from jaxcrit.models.model import EMBEDDED_MODEL
from jaxcrit.reporting import plots
from jaxcrit.reporting.report import Figure, on_axes

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_of_options_is_current():
    page = (DOCS / "options.md").read_text(encoding="utf-8")
    assert page == options_page(), "python -m jaxcrit.commands.reference > docs/options.md"


def test_every_public_name_is_in_the_docs():
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    told = set(re.findall(r"\bjc\.(\w+)", text))
    assert {name for name in jaxcrit.__all__ if name[0].islower()} <= told
    assert told <= set(jaxcrit.__all__)


def test_links_between_pages_lead_somewhere():
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_has_its_place_on_the_site():
    lines = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2].splitlines()
    placed = [re.split(r"[ -]", line)[-1] for line in lines if line.endswith(".md")]
    assert len(placed) == len(set(placed))
    assert {page.name for page in DOCS.glob("*.md")} == set(placed) - {"index.md", "changelog.md", "model_card.md"}


def test_commands_in_the_docs_have_these_flags():
    """Lines of shell with a command whose flags have values; placeholders such as FILE are values too."""
    found = 0
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for command, words in re.findall(r"^    jaxcrit (\w+)([^\n|&]*)$", text, re.MULTILINE):
            module = importlib.import_module(COMMANDS[command][0])
            known = [
                one.name for kind in (module.OPTIONS, ProcessOptions, *further(module)) for one in options_of(kind)
            ]
            for flag in re.findall(r" --([\w.]+)", words):
                assert flag.removeprefix("no") in known or flag in known, f"{page.name}: jaxcrit {command} --{flag}"
                found += 1
    assert found > 40


@pytest.mark.skipif(not os.environ.get("JAXCRIT_EXPLORE"), reason="takes minutes; run it with JAXCRIT_EXPLORE=1")
def test_marked_commands_of_the_guide_run(monkeypatch, tmp_path):
    """In order, in one directory, with what their marks put in place of capitals."""
    monkeypatch.chdir(tmp_path)
    os.symlink(EMBEDDED_MODEL, "model")
    for name, split in (("rows", "train"), ("test", "test")):
        rows = demo.generate("order", 60, seed=0, split=split)
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main(["analyze", "--model=model", "--data=rows.jsonl", "--out=an"]) == 0
    blocks = re.findall(r"<!-- run (.*?) -->\n\n((?:    .*\n)+)", (DOCS / "guide.md").read_text(encoding="utf-8"))
    for told, block in blocks:
        for word in told.split():
            capitals, _, value = word.partition("=")
            block = re.sub(rf"\b{re.escape(capitals)}\b", value, block)
        for line in block.splitlines():
            assert main(shlex.split(line)[1:]) == 0, line
    assert len(blocks) >= 10


def test_states_in_the_docs_are_accepted():
    """Every flag of docs/states.md with its value."""
    lines = re.findall(r"^    jaxcrit analyze (.*)$", (DOCS / "states.md").read_text(encoding="utf-8"), re.MULTILINE)
    for line in lines:
        (options,) = read([AnalyzeOptions], "analyze", shlex.split(line))
        assert options.states
    assert len(lines) >= 4


def block(title: str, number: int = 0) -> str:
    """A block of Python under a heading of the guide for contributors."""
    page = (DOCS / "contributing.md").read_text(encoding="utf-8")
    section = page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return section.split("```python\n")[1 + number].partition("```")[0]


def module_of(monkeypatch, name: str, text: str) -> types.ModuleType:
    made = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, made)
    exec(compile(text, name, "exec"), made.__dict__)
    return made


def test_the_criterion_of_the_guide_works(monkeypatch, tmp_path):
    module_of(monkeypatch, "jaxcrit.criteria.activation_norm", block("A criterion"))
    monkeypatch.setattr(registry, "FILES", {**registry.FILES, "activation_norm": "activation_norm"})
    model = jaxcrit.load()
    rows = {"limit": 6, "criteria": "activation_norm"}
    found = jaxcrit.score(model, "demo:arithmetic", **rows)["activation_norm"]
    states = np.asarray(jaxcrit.capture(model, "demo:arithmetic", limit=6).hidden)
    np.testing.assert_allclose(found.values, np.linalg.norm(states, axis=-1).mean(axis=1), rtol=1e-5)
    assert found.stderr is not None and found.direction == "high"
    assert "| growth of the stream | direction |" in registry.table()
    asked = ["--data=demo:arithmetic", "--limit=6", "--criteria=activation_norm", f"--out={tmp_path / 'run'}"]
    assert main(["score", *asked]) == 0
    assert main(["select", f"--scores={tmp_path / 'run' / 'scores.json'}", "--layers=activation_norm:3"]) == 0


def test_the_criterion_with_options_of_the_guide_works(monkeypatch):
    made = module_of(monkeypatch, "jaxcrit.criteria.activation_norm", block("A criterion"))
    exec(compile(block("A criterion", 1), "with options", "exec"), made.__dict__)
    monkeypatch.setattr(made, "CRITERIA", {"activation_norm": made.with_power})
    monkeypatch.setattr(registry, "FILES", {**registry.FILES, "activation_norm": "activation_norm"})
    monkeypatch.setattr(registry, "WITH_OPTIONS", (*registry.WITH_OPTIONS, "activation_norm"))
    model = jaxcrit.load()
    asked = {"rows": "demo:arithmetic", "limit": 6, "criteria": "activation_norm"}
    states = np.asarray(jaxcrit.capture(model, "demo:arithmetic", limit=6).hidden)
    for power in (1, 2):
        found = jaxcrit.score(model, **asked, activation_norm={"power": power})["activation_norm"]
        expected = (np.linalg.norm(states, axis=-1) ** power).mean(axis=1)
        np.testing.assert_allclose(found.values, expected, rtol=1e-5)
    with pytest.raises(UserError, match=r"activation_norm=2: expected a dict, such as activation_norm=\{'power'"):
        jaxcrit.score(model, **asked, activation_norm=2)
    with pytest.raises(TypeError, match="a function of these that returns the tap"):
        dataclasses.replace(made.with_power, tap=made.tap)
    assert made.with_power.tapped({}) is made.with_power.tapped({})


def test_the_file_of_the_guide_is_checked(monkeypatch, tmp_path):
    made = module_of(monkeypatch, "jaxcrit_lengths_file", block("A file that is read back"))
    write_json(tmp_path / "lengths.json", "jaxcrit.lengths", {"longest": 3, "rows": {"a": [3, 0]}})
    assert made.read_lengths(tmp_path / "lengths.json")["rows"] == {"a": [3, 0]}
    write_json(tmp_path / "lengths.json", "jaxcrit.lengths", {"longest": 3, "rows": {"a": [3, "0"]}})
    with pytest.raises(UserError, match=r"lengths.json: expected rows.a\[1\] to be a whole number of 0 or more"):
        made.read_lengths(tmp_path / "lengths.json")


def test_the_command_of_the_guide_works(monkeypatch, tmp_path, capsys):
    module_of(monkeypatch, "jaxcrit.commands.lengths", block("A command"))
    monkeypatch.setitem(COMMANDS, "lengths", ("jaxcrit.commands.lengths", "how long prompts are"))
    assert main(["lengths", "--help"]) == 0
    assert "--least=N" in capsys.readouterr().out
    asked = ["lengths", "--data=demo:arithmetic", "--limit=6", f"--out={tmp_path / 'run'}"]
    assert main(asked) == 0
    assert "tokens in 1 datasets" in capsys.readouterr().out and (tmp_path / "run" / "report.html").exists()
    assert main([*asked, "--least=2"]) == 2, "another run"
    assert main(["lengths", "--least=0"]) == 2


def test_the_family_of_the_guide_works(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    exec(block("A family"), {"FAMILIES": families.FAMILIES, "Family": families.Family})
    monkeypatch.setattr(config, "FAMILIES", families.FAMILIES)
    raw = {**raw_config("llama-gqa"), "model_type": "mine", "architectures": []}
    found = config.ModelConfig.from_hf(raw)
    assert found.family == "mine" and found.qk_norm


def test_the_plot_of_the_guide_works():
    space = {"Sequence": Sequence, "Axes": Axes, "LINES": plots.LINES}
    exec(compile("from __future__ import annotations\n" + block("A plot"), "plot", "exec"), space)
    figure = Figure("lengths.png", on_axes(space["length_histogram"], [3, 4, 5]), "Prompts.")
    assert figure.png().startswith(b"\x89PNG")
