"""The experiment end to end on a tiny model, and what the kept results must hold together."""

import json
from pathlib import Path

import pc_removal
from support.tiny_model import prompts_file, tiny_checkpoint

from jaxcrit.core.files import read_json

RESULTS = Path(pc_removal.__file__).parent / "results" / "pc_removal.json"


def test_prints_and_writes(tmp_path, capsys):
    data, out = prompts_file(tmp_path / "prompts.jsonl"), tmp_path / "out"
    flags = ["--layers=2,4", "--sets=0;0,2;random:0,2", "--max_new_tokens=5", "--batch_size=8", "--mesh=data=1,fsdp=-1"]
    pc_removal.main([f"--model={tiny_checkpoint(tmp_path / 'model')}", f"--data={data}", f"--out={out}", *flags])
    printed = capsys.readouterr().out
    found = read_json(out / "removal.json", "jaxcrit.removal")
    assert len(found["datasets"][0]["cells"]) == 6 and "exact match unknown" in printed
    assert (out / "removal-prompts.jsonl.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(found, allow_nan=False)


def test_kept_results():
    """300 prompts x 16 layers x 4 sets of each family; one prefill and one loop compiled for each bucket."""
    for one in read_json(RESULTS, "jaxcrit.removal")["datasets"]:
        assert one["plain"]["n"] == 300 and len(one["cells"]) == 64
        assert one["compiled"] == [one["buckets"]] * 2
        assert one["cpu_seconds"] < 300  # so two cores, or one, need less than five minutes
