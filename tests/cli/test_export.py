"""``jaxcrit export``: flags become one library call."""

from __future__ import annotations

import sys
import types
from pathlib import Path

from jaxcrit.cli.main import main


def test_flags_become_one_call(monkeypatch, capsys):
    calls = []

    def export(model, out, *, dtype, progress):
        progress(1, 2, "embed")
        progress(2, 2, "head")
        calls.append((model, out, dtype))
        return Path(out)

    module = types.ModuleType("jaxcrit.models.export")
    module.export = export
    monkeypatch.setitem(sys.modules, "jaxcrit.models.export", module)
    assert main(["export", "--model=in", "--out=there", "--dtype=bfloat16"]) == 0
    assert calls == [("in", "there", "bfloat16")]
    assert capsys.readouterr() == ("there\n", "")
