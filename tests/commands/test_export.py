"""``jaxcrit export``: flags become one library call."""

from __future__ import annotations

import types
from pathlib import Path

import pytest

from jaxcrit.commands.main import main


@pytest.mark.parametrize("flag", ["model", "run"])
def test_flags_become_one_call(monkeypatch, capsys, flag):
    calls = []

    def export_model(model, out, *, dtype, delta_only, adapter, step, progress):
        progress(1, 2, "embed")
        progress(2, 2, "head")
        calls.append((model, out, dtype, delta_only, adapter, step))
        rounding = "rounding: little" if delta_only else None
        return types.SimpleNamespace(out=Path(out), rounding=rounding, step=4 if adapter else None)

    monkeypatch.setattr("jaxcrit.commands.export.export_model", export_model)
    assert main(["export", f"--{flag}=in", "--out=there", "--dtype=bfloat16"]) == 0
    following = "next, to load it in Python:\n  transformers.AutoModelForCausalLM.from_pretrained('there')\n"
    assert capsys.readouterr() == ("there\n", following)
    assert main(["export", f"--{flag}=in", "--out=there", "--delta_only"]) == 0
    assert capsys.readouterr() == ("rounding: little\nthere\n", "")
    assert main(["export", f"--{flag}=in", "--out=there", "--adapter", "--step=best"]) == 0
    assert capsys.readouterr() == ("in: checkpoint of step 4, written as there:\nthere\n", "")
    assert calls == [
        ("in", "there", "bfloat16", False, False, ""),
        ("in", "there", "source", True, False, ""),
        ("in", "there", "source", False, True, "best"),
    ]


def test_one_of_model_and_run(capsys):
    assert main(["export", "--out=there"]) == 2
    assert main(["export", "--model=a", "--run=b", "--out=there"]) == 2
    assert main(["export", "--model=a"]) == 2
    assert capsys.readouterr().err.count("jaxcrit: error: export: expected --") == 3
