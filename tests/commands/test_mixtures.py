"""What is of mixtures alone: training of experts and of attention, figures by expert, meshes, and what does not go.

That every command runs on one is tried by ``python -m support.mixture_commands``, which takes longer.
"""

import contextlib
import io

import jax
import numpy as np
import pytest
from support.family_models import raw_config
from support.mixture_commands import TRAIN, folder_of
from support.tiny_model import tiny_checkpoint

from jaxcrit.commands.main import main
from jaxcrit.commands.score import ScoreOptions, run_score
from jaxcrit.core.errors import UserError
from jaxcrit.evidence.weights import layer_tensors
from jaxcrit.models import mixture
from jaxcrit.models import model as session
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.lora import make_lora
from jaxcrit.models.model import open_model
from jaxcrit.parallel.mesh import make_mesh
from jaxcrit.studies.editing import check


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = folder_of(tmp_path_factory.mktemp("mixtures"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path


@pytest.fixture(scope="module")
def told(folder):
    """What training the experts of two layers printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        asked = ["finetune", "--model=model", "--layers=1-2", "--out=finetune-experts", *TRAIN.split()]
        assert main(asked) == 0, said.getvalue()
    return " ".join(said.getvalue().split())


def test_training_says_that_there_is_no_balance_loss(told):
    assert "; without a balance loss, so that few experts may come to do most of the work (--router_aux adds" in told


def test_what_trains_is_what_was_named(folder, told):
    """Experts and routers of the chosen layers move, those of others do not."""
    pairs = zip(layer_tensors(open_model("model")), layer_tensors(open_model("finetune-experts")), strict=True)
    moved = [{path for path in one if not np.array_equal(one[path], other[path])} for one, other in pairs]
    assert {"blocks.router", "blocks.gate", "blocks.up", "blocks.down"} <= moved[1] & moved[2]
    assert not (moved[0] or moved[3] or moved[4])


def test_adapters_are_of_attention_alone(folder):
    lora = make_lora(open_model("model").config, 2)
    assert lora.targets == ("o", "q", "k", "v") and lora.shapes(open_model("model").config, 2).keys() == {
        f"blocks.{name}_lora_{end}" for name in "qkvo" for end in "ab"
    }


def test_scores_by_expert(folder, told):
    """Spectra and changes of each expert beside those of the layer, which stand for their mean and their sum."""
    scores = run_score(
        ScoreOptions(model="finetune-experts", base="model", criteria="weight_change,stable_rank"), keep=False
    ).scores
    change, rank = (np.array(scores[key].meta["experts"]) for key in ("weight_change", "stable_rank"))
    assert change.shape == rank.shape == (5, 4) and (change[[1, 2]] > 0).all() and not change[[0, 3, 4]].any()
    tensors = list(layer_tensors(open_model("finetune-experts")))
    kinds = {path: [value for value in np.stack([one[path] for one in tensors])] for path in tensors[0]}
    by_hand = []
    for path in ("blocks.gate", "blocks.up", "blocks.down"):
        values = np.linalg.svd(np.array(kinds[path], np.float64), compute_uv=False)
        ranks = (values**2).sum(-1) / values[..., 0] ** 2
        by_hand.append(ranks / ranks.mean())
    np.testing.assert_allclose(rank, np.mean(by_hand, axis=0), rtol=1e-5)


@pytest.fixture(scope="module")
def sensitivity(folder):
    """A function of a mesh that gives the score, forward and backward through experts; what one device finds."""

    def run(mesh):
        asked = {"model": "model", "data": "rows.jsonl", "template": "none", "criteria": "routing_sensitivity"}
        return run_score(ScoreOptions(**asked, mesh=mesh), keep=False).scores["routing_sensitivity"]

    one = make_mesh({"data": 1}, jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "_SMALL", 0)  # blocks of pairs, as larger models have it
        with pytest.MonkeyPatch.context() as alone:
            alone.setattr(session, "make_mesh", lambda axes: one)
            expected = run("")
        yield run, expected


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=4,tensor=2"])
def test_meshes_find_what_one_device_finds(mesh, sensitivity):
    run, expected = sensitivity
    found = run(mesh)
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.meta["load"], expected.meta["load"], atol=1e-12)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            f"finetune --model=model --layers=all --lora_rank=2 --lora_targets=q,up {TRAIN} --out=none",
            "--lora_targets=up: is of the 4 experts of each layer, which have no adapters (nor has their router)",
        ),
        (
            f"finetune --model=dense --layers=all {TRAIN} --router_aux=0.1 --out=none",
            "--router_aux=0.1: is of a mixture of experts; this llama model has no router",
        ),
        (
            "score --model=dense --data=rows.jsonl --criteria=routing_sensitivity --template=none --out=none",
            "--criteria=routing_sensitivity: is of a mixture of experts; this llama model has no router",
        ),
    ],
)
def test_what_does_not_go_is_said_in_a_line(asked, message, folder, capsys):
    if "dense" in asked and not (folder / "dense").exists():
        tiny_checkpoint(folder / "dense")
    assert main(asked.split()) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_facts_cannot_be_edited_in_a_mixture():
    with pytest.raises(UserError, match="mixtral models have 4 experts in each layer, so that what down reads depends"):
        check(ModelConfig.from_hf(raw_config("mixtral")))
