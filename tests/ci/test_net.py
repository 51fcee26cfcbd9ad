"""The net of .ci/net.py: what it takes for equal, what it finds, and which differences may be."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / ".ci"))

import net_compare
import net_list
import net_record
from net_step import Step

ROOT = Path(__file__).parents[2]


@pytest.fixture
def places(tmp_path):
    """Two recordings of one command that ran, with a run directory each."""
    found = []
    for name in ("before", "after"):
        place = net_record.Place(tmp_path / f"{name}-checkout", tmp_path / name)
        (place.scratch / "command").mkdir(parents=True)
        place.records.mkdir()
        cost = {"exit": 0, "peak": 100, "compiles": 2, "runs": 3, "flops": 5, "temporaries": 7, "jax": True}
        (place.records / "command.json").write_text(json.dumps(cost))
        (place.records / "command.out").write_text(f"done in {len(name)}.5 s\nreport: {place.scratch}/command\n")
        found.append(place)
    return found


STEP = Step("step", "\n        command: select\n        ")


def differences(places):
    (verdict,) = net_compare.compared(STEP, *places)
    return {difference.path: difference.what for difference in verdict.differences}


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def test_times_and_places_are_no_difference(places):
    for seconds, place in enumerate(places):
        run = {"config": {"window": 5}, "time": seconds, "versions": seconds, "model": {"path": "", "dtype": seconds}}
        (place.scratch / "command/run.json").write_text(json.dumps(run))
        (place.scratch / "command/metrics.jsonl").write_text(json.dumps({"loss": 1.5, "seconds": seconds}) + "\n")
        page = f"<td><code>time.seconds</code></td><td>{seconds}</td>"
        (place.scratch / "command/report.html").write_text(f"<p>1.5</p><table><tr>{page}</tr></table>")
        (place.scratch / "command/delta.png").write_bytes(bytes([seconds]))
    assert differences(places) == {}


def test_what_differs_is_found(places):
    for number, place in enumerate(places):
        (place.scratch / "command/scores.json").write_text(json.dumps({"values": [1.0, 2.0 + number / 8]}))
        (place.scratch / "command/cka.npz").write_bytes(npz(biased=np.array([1.0, 2 + number / 4])))
        (place.scratch / f"command/only{number}.txt").write_text("")
    cost = json.loads((places[1].records / "command.json").read_text())
    (places[1].records / "command.json").write_text(json.dumps(cost | {"exit": 1, "runs": 4}))
    (places[1].records / "command.out").write_text("done\n")
    found = differences(places)
    assert "0.125" in found["scores.json"] and "0.25" in found["cka.npz"]
    assert found["only0.txt"] == "only before" and found["only1.txt"] == "only after"
    assert {"@exit", "@runs", "@stdout"} <= found.keys() and "@flops" not in found


def test_a_nan_equals_a_nan_and_nothing_else():
    assert net_compare.values_differ([float("nan")], [float("nan")]) == ""
    assert net_compare.values_differ([float("nan")], [1.0]) and net_compare.values_differ([1.0], [1])


def test_allowed_differences_have_a_reason(tmp_path):
    path = tmp_path / "allow.txt"
    path.write_text("# note\nanalyze*: scores.json: a float32 tap\n")
    allowed = net_compare.Allowed.read(path)
    assert allowed.covers("analyze_all", "scores.json") and not allowed.covers("score", "scores.json")
    assert allowed.used == [True]
    path.write_text("analyze: scores.json\n")
    with pytest.raises(ValueError, match="line 1: expected command: path-glob: reason"):
        net_compare.Allowed.read(path)


def test_every_step_can_be_read_and_needs_only_earlier_ones():
    seen, commands = set(), []
    for step in net_list.STEPS:
        assert set(step.needs) <= seen, step.name
        seen.add(step.name)
        commands += step.commands(net_list.SHORT)
    assert len(set(commands)) == len(commands)


def test_an_option_is_known_by_the_help_page():
    page = "  --form=auto|tiled      of the sweep [auto]\n  --[no]compile          compile\n  --data=FILE    rows"
    for option in ("--form=tiled", "--form", "--nocompile", "--compile", "--data=x.jsonl"):
        assert net_record.knows(page, option), option
    for option in ("--form=streamed", "--forms=tiled", "--dat=x"):
        assert not net_record.knows(page, option), option


def test_entry_point_of_this_checkout():
    module, _, function = net_record.entry_point(ROOT).partition(":")
    assert (ROOT / Path(*module.split("."))).with_suffix(".py").exists() and function == "main"
