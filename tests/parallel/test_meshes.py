"""Eight devices in any arrangement give what one gives, for every job that a model is put to; and wrong meshes."""

import jax
import numpy as np
import pytest
from support.family_models import MESHES
from support.tiny_model import prompts_file, tiny_checkpoint

from jaxcrit.commands.ablate import AblateOptions, run_ablate
from jaxcrit.commands.generate import GenerateOptions, run_generate
from jaxcrit.commands.score import ScoreOptions, run_score
from jaxcrit.commands.screen import ScreenOptions, run_screen
from jaxcrit.commands.substitute import SubstituteOptions, run_substitute
from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import AnalyzeOptions
from jaxcrit.models import model as session
from jaxcrit.models.model import open_model
from jaxcrit.parallel.mesh import default_axes, device_memory, make_mesh
from jaxcrit.studies.analysis import run_analysis


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A function of a mesh that runs every job on it; what one device finds."""
    folder = tmp_path_factory.mktemp("meshes")
    models = [str(tiny_checkpoint(folder / str(seed), seed=seed)) for seed in (0, 1)]
    prompts = prompts_file(folder / "prompts.jsonl", 16)
    rows = folder / "rows.jsonl"
    rows.write_text(prompts.read_text().replace('"}', '", "response": "one two"}'))

    def run(mesh):
        out = str(folder / str(mesh))
        shared = {"data": str(rows), "mesh": mesh, "template": "none"}
        analysed = run_analysis(AnalyzeOptions(model=models[0], out=f"{out}-a", **shared))
        substituted = run_substitute(
            SubstituteOptions(base=models[0], tuned=models[1], window=3, out=f"{out}-s", **shared)
        )
        criteria = "lens_kl,gradient_norm,effective_rank"
        scored = run_score(ScoreOptions(model=models[0], criteria=criteria, out=f"{out}-c", **shared))
        screened = run_screen(
            ScreenOptions(model=models[0], benign=str(rows), classes="family", out=f"{out}-f", **shared)
        )
        gains = {"methods": "gain", "sites": "attn", "gains": "0.5", "trigger": "zq@suffix", "target": "one two"}
        ablated = run_ablate(AblateOptions(model=models[0], out=f"{out}-b", **gains, **shared))
        asked = GenerateOptions(model=models[0], max_new_tokens=4, batch_size=8, out=f"{out}-g", **shared)
        (answers,) = run_generate(asked).rows.values()
        scores = analysed.scores | substituted.scores | scored.scores | screened.scores | ablated.scores
        said = [(row["token_ids"], flag["flagged"]) for row, flag in zip(answers, screened.flags, strict=True)]
        return scores, said

    one = make_mesh({"data": 1}, jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "make_mesh", lambda axes: one)
        expected = run("")
    return run, expected


@pytest.mark.parametrize("mesh", MESHES)
def test_every_job_finds_what_one_device_finds(mesh, study):
    run, (scores, answers) = study
    found, said = run(mesh)
    assert found.keys() == scores.keys() and said == answers
    for key, score in scores.items():
        np.testing.assert_allclose(found[key].values, score.values, rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("data=3", "product is 8, the number of devices, got 3"),
        ("tensor=8", "model.layers.{}.self_attn.o_proj.weight: heads of size 4 does not divide over tensor=8"),
        ("data=4,model=2", "expected axes data, fsdp, tensor, got 'model'"),
    ],
)
def test_wrong_meshes_in_a_line(mesh, message, tmp_path):
    with pytest.raises(UserError) as caught:
        open_model(str(tiny_checkpoint(tmp_path / "model")), mesh=mesh).decoder()
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "width", "devices", "fsdp"),
    [(1e9, 64, 8, 1), (5e9, 64, 8, 2), (20e9, 64, 8, 8), (1e15, 64, 8, 8), (20e9, 12, 8, 4), (9e9, 96, 6, 3)],
)
def test_without_a_mesh_weights_are_split_as_far_as_they_have_to_be(weights, width, devices, fsdp):
    assert default_axes(weights, width, devices, memory=3e9) == {"data": -1, "fsdp": fsdp}


def test_the_default_mesh_goes_by_the_model_and_the_devices(tmp_path, monkeypatch):
    path = str(tiny_checkpoint(tmp_path))
    assert dict(open_model(path).mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(open_model(path).decoder()))
    monkeypatch.setattr(session, "device_memory", lambda _: weights / 2 - 1)
    assert dict(open_model(path).mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert dict(open_model(path, dtype="bfloat16").mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    # What trains has a gradient and two moments beside it, in float32 whatever the file holds.
    monkeypatch.setattr(session, "device_memory", lambda _: weights * 2)
    assert dict(open_model(path, trains=True).mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert dict(open_model(path).mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}


def test_memory_of_a_device():
    assert 0 < device_memory(jax.devices()) == device_memory(jax.devices()[:4]) / 2
