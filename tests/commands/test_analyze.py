"""``jaxcrit analyze``: flags become one config and one library call; table and report come out."""

from __future__ import annotations

import sys
import types

import pytest
from support import synthetic_analysis as synthetic

from jaxcrit.commands.main import main


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Stands in for the study: notes the config, returns an analysis made up from a formula."""
    seen = []
    module = types.ModuleType("jaxcrit.studies.analysis")

    def run_analysis(config, progress, finish):
        with progress(total=3, desc="dolly") as bar:
            bar.update(3)
        seen.append(config)
        analysis = synthetic.analysis(tmp_path)
        finish(analysis)
        return analysis

    module.Analysis, module.run_analysis = None, run_analysis
    monkeypatch.setitem(sys.modules, "jaxcrit.studies.analysis", module)
    return seen


def test_flags_become_the_config(calls, capsys, tmp_path):
    assert (
        main(
            [
                "analyze",
                "--model",
                "m",
                "--embed",
                "--save_activations",
                "--noinclude_self",
                "--window=7",
                "--layers=first:2",
            ]
        )
        == 0
    )
    config = calls[0]
    assert (config.model, config.embed, config.include_self, config.window) == ("m", True, False, 7)
    assert config.layers == "first:2" and config.bias == "debiased"
    out, err = capsys.readouterr()
    assert "Critical layers: " in out and "How sure: " in out and "\x1b" not in out
    assert f"\nreport: {tmp_path / 'report.html'}\n" in out
    assert err == "", "what is quickly done says nothing"
    assert (tmp_path / "report.html").exists()
