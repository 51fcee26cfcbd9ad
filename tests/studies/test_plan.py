"""``jaxcrit plan``: shapes anywhere, and Llama-2-7B compiled for sixteen TPUs that are not here."""

from __future__ import annotations

import importlib.util
import json

import pytest

from jaxcrit.cli import main as cli
from jaxcrit.core.errors import UserError
from jaxcrit.models.shapes import SHAPES
from jaxcrit.parallel.chips import Topology
from jaxcrit.studies.plan import PlanConfig, fitting, run_plan

GIB = 2**30
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu: pip install -e '.[plan]'"
)


def plan(**asked):
    return run_plan(PlanConfig(**{"model": "llama2-7b", "mesh": "fsdp=4,tensor=4", **asked}))


@needs_libtpu
@pytest.mark.parametrize(
    ("job", "layers", "most"), [("analyze", "all", 1.4), ("finetune", "10-14", 3.6), ("finetune", "all", 10.5)]
)
def test_memory_of_a_compiled_job(job, layers, most):
    found = plan(job=job, layers=layers)
    assert found.topology.devices == 16 and found.fits and found.peak / GIB <= most
    assert found.compiled.collectives["all-gather"][1] > 0
    # What shapes alone say of arguments and state.
    assert sum(found.memory.values()) == pytest.approx(found.compiled.arguments, rel=0.15)


@needs_libtpu
def test_a_program_too_large_says_by_how_much(capsys):
    arguments = ["plan", "--model=llama3.1-8b", "--topology=v5e:2x2", "--layers=all", "--batch_size=4"]
    assert cli.main(arguments) == 3
    out = capsys.readouterr().out
    assert "does not fit, by" in out and out.count("nothing on this topology") + out.count("would fit, by shapes") == 1


def test_shapes_alone_know_what_stays_in_memory():
    """Critical-only: bf16 weights over 16 devices, float32 masters and two moments of five layers, to the byte."""
    found = plan(layers="10-14", compile=False)
    block = 4 * 4096**2 + 3 * 4096 * 11008  # norms are whole on the tensor axis, so they stand apart
    outside = 2 * 32000 * 4096
    norms = 4096 * (2 * 32 + 1)
    trained, moments = found.memory["weights"], found.memory["optimizer"]
    assert moments == pytest.approx(2 * 4 * 5 * block / 16, rel=1e-3)
    assert trained == pytest.approx((2 * (27 * block + outside) + 4 * 5 * block) / 16 + 2 * norms / 4, rel=1e-3)
    assert found.trained == 5 * (block + 2 * 4096)
    assert found.compiled is None and "as asked" in found.notes[0]
    tokens = 32 * 1024
    forward = 2 * tokens * (32 * block + 32000 * 4096) + 32 * 4 * 32 * 1024**2 * 4096
    # Forward whole, again above the lowest trained layer (remat), gradients there: between 2 and 4 forwards.
    assert 2 < found.flops * 16 / forward < 4


def test_gpus_are_planned_by_shapes(capsys):
    assert cli.main(["plan", "--model=llama2-7b", "--topology=h100:8", "--layers=all"]) == 0
    out = capsys.readouterr().out
    assert "of 80.00: fits" in out and "no compiler for GPUs" in out and max(map(len, out.splitlines())) <= 100


def test_what_does_not_fit_exits_3_and_names_what_would(capsys):
    arguments = ["plan", "--model=llama3.1-70b", "--topology=h100:8", "--layers=10-14", "--batch_size=512"]
    assert cli.main(arguments) == 3
    out = capsys.readouterr().out
    assert "does not fit, by" in out
    mesh, batch = out.split("--mesh=")[1].split(" --batch_size=")
    config = PlanConfig(model="llama3.1-70b", topology="h100:8", layers="10-14", mesh=mesh, batch_size=int(batch))
    assert run_plan(config).fits
    assert fitting(PlanConfig(model="llama3.1-70b", topology="v5e:1x1", layers="all")) is None


def test_search_takes_the_fastest_that_fits():
    found = plan(topology="h100:8", search=True, layers="10-14", mesh="")
    whole = plan(topology="h100:8", layers="10-14", mesh="fsdp=8")
    assert found.fits
    assert max(found.seconds.values()) / found.config.batch_size <= max(whole.seconds.values()) / 32


def test_a_directory_is_a_shape_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["llama2-7b"]))
    named, read = plan(compile=False), plan(compile=False, model=str(tmp_path))
    assert (named.memory, named.flops) == (read.memory, read.flops)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"model": "llama2-7"}, "did you mean 'llama2-7b'"),
        ({"model": "nowhere"}, "expected a directory with a config.json or one of"),
        ({"topology": "v5:4x4"}, "did you mean 'v5"),
        ({"topology": "v5e-16"}, "expected a name such as v5e:4x4"),
        ({"topology": "h100:0"}, "at least one chip"),
        ({"mesh": "fsdp=3"}, "product is 16"),
        ({"mesh": "fsdp=1,tensor=16", "model": "qwen2.5-7b"}, "heads of size 28 does not divide"),
        ({"batch_size": 3}, "does not divide over data.fsdp=4"),
        ({"job": "finetun"}, "did you mean 'finetune'"),
        ({"layers": "critical:5"}, "name layers"),
    ],
)
def test_mistakes(asked, message):
    with pytest.raises(UserError, match=message):
        plan(compile=False, **asked)


def test_without_libtpu_shapes_answer(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = plan(layers="10-14")
    assert found.compiled is None and "pip install 'jaxcrit[plan]'" in found.notes[0]


def test_topologies_multiply():
    assert [Topology.parse(name).devices for name in ("v5e:4x4", "v5p:4x4x4", "h200:2x8", "h100:8")] == [16, 64, 16, 8]
