"""The experiment end to end on a tiny model, and what the kept results must hold together."""

import json
from pathlib import Path

import pc_removal
import pytest
import removal
from support.tiny_model import prompts_file, tiny_checkpoint

from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_json

RESULTS = Path(pc_removal.__file__).parent / "results" / "pc_removal.json"
FLAGS = ["--layers=2,4", "--sets=0;0,2;random:0,2", "--max_new_tokens=5", "--batch_size=8", "--mesh=data=1,fsdp=-1"]


def asked(tmp_path):
    model, data = tiny_checkpoint(tmp_path / "model"), prompts_file(tmp_path / "prompts.jsonl")
    return [f"--model={model}", f"--data={data}", *FLAGS]


def test_prints_and_writes(tmp_path, capsys):
    out = tmp_path / "out"
    pc_removal.main([*asked(tmp_path), f"--out={out}"])
    printed = capsys.readouterr().out
    found = read_json(out / "removal.json", "jaxcrit.removal")
    assert len(found["datasets"][0]["cells"]) == 6 and "exact match unknown" in printed
    assert (out / "removal-prompts.jsonl.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(found, allow_nan=False)


def test_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    """The second call makes the second batch, and finds what a call that was never interrupted finds."""
    flags, whole, out = asked(tmp_path), tmp_path / "whole", tmp_path / "out"
    pc_removal.main([*flags, f"--out={whole}"])
    prefill, called = removal.prefill, []

    def failing(*arguments, **named):
        called.append(1)
        if len(called) == 2:
            raise KeyboardInterrupt
        return prefill(*arguments, **named)

    monkeypatch.setattr(removal, "prefill", failing)
    with pytest.raises(KeyboardInterrupt):
        pc_removal.main([*flags, f"--out={out}"])
    assert len(list((out / "cells").iterdir())) == 1
    pc_removal.main([*flags, f"--out={out}"])
    assert len(called) == 3  # the second batch was begun twice
    for cell in (whole / "cells").iterdir():
        assert (out / "cells" / cell.name).read_bytes() == cell.read_bytes()
    ours, theirs = (read_json(at / "removal.json", "jaxcrit.removal")["datasets"][0] for at in (out, whole))
    assert all(ours[key] == theirs[key] for key in ("plain", "cells", "contrasts", "example"))
    with pytest.raises(UserError, match=r"was begun with seed 0, now 6"):
        pc_removal.main([*flags, f"--out={out}", "--seed=6"])


def test_kept_results():
    """300 prompts x 16 layers x 4 sets of each family; one prefill and one loop compiled for each bucket."""
    for one in read_json(RESULTS, "jaxcrit.removal")["datasets"]:
        assert one["plain"]["n"] == 300 and len(one["cells"]) == 64
        assert one["compiled"] == [one["buckets"]] * 2
        assert one["cpu_seconds"] < 300  # so two cores, or one, need less than five minutes
