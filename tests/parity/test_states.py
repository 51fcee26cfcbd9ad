"""States captured by torch hooks, as docs/states.md has it, are states: scores as of jaxcrit's own pass; any family."""

import os
from pathlib import Path

import numpy as np
import pytest
from support.family_models import raw_config
from support.tiny import tiny_tokenizer_dir

import jaxcrit as jc
from jaxcrit.commands.main import main

torch = pytest.importorskip("torch", reason="parity needs torch")
transformers = pytest.importorskip("transformers")
from support import reference  # noqa: E402  (needs torch)

PAGE = Path(__file__).parents[2] / "docs" / "states.md"
RNG = np.random.default_rng(0)
IDS = [RNG.integers(3, 90, RNG.integers(4, 20)).tolist() for _ in range(24)]


class Given:
    """In place of a tokenizer: prompts are token ids."""

    def __call__(self, prompt, return_tensors):
        return {"input_ids": torch.tensor([prompt])}


def hooked(monkeypatch, folder, model, blocks, prompts=IDS):
    """Runs the page's own lines; the file they write."""
    code = PAGE.read_text(encoding="utf-8").partition("## Hooks")[2].partition("```python\n")[2].partition("```")[0]
    assert "model.model.layers" in code
    monkeypatch.chdir(folder)
    for automatic, made in (("AutoModelForCausalLM", model), ("AutoTokenizer", Given())):
        monkeypatch.setattr(
            getattr(transformers, automatic), "from_pretrained", lambda *given, made=made, **named: made
        )
    exec(compile(code.replace("model.model.layers", blocks), "states.md", "exec"), {"name": "", "prompts": prompts})
    monkeypatch.undo()
    return folder / "states.npz"


def test_scores_of_hooks_are_those_of_the_model(monkeypatch, tmp_path):
    raw = {**raw_config("llama-gqa"), "num_hidden_layers": 7}
    model = reference.make(raw, tmp_path / "model")
    tiny_tokenizer_dir(tmp_path / "model")
    own = jc.load(tmp_path / "model")
    file = hooked(monkeypatch, tmp_path, model, "model.model.layers")
    ours, theirs = jc.score(jc.capture(own, IDS)), jc.score(jc.states(file, axes="nld", ends="blocks"))
    for key, one in ours.items():
        np.testing.assert_allclose(theirs[key].values, one.values, atol=1e-5, err_msg=key)
        np.testing.assert_allclose(theirs[key].stderr, one.stderr, atol=1e-5, err_msg=key)
    with torch.no_grad():
        outputs = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in IDS]
    array = np.stack([np.stack([layer[0, -1].numpy() for layer in states]) for states in outputs])
    ends = jc.score(jc.states(array, axes="nld", ends="embed,normed"))
    assert not ends["step"].valid[-1] and ends["step"].num_layers == 7
    np.testing.assert_allclose(ends["step"].values[:-1], ours["step"].values[:-1], atol=1e-5)


TINY = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 7, "vocab_size": 100}
UNKNOWN = {  # mixtures, and families that jaxcrit does not run
    "granitemoe": ({"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4}, "model.model.layers"),
    "qwen2_moe": (
        {
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 4,
        },
        "model.model.layers",
    ),
    "gpt2": ({}, "model.transformer.h"),
    "gpt_neox": ({"intermediate_size": 64}, "model.gpt_neox.layers"),
}


@pytest.mark.parametrize("family", UNKNOWN)
def test_a_family_that_jaxcrit_does_not_run(family, monkeypatch, tmp_path):
    changes, blocks = UNKNOWN[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **TINY, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    file = hooked(monkeypatch, tmp_path, model, blocks)
    asked = ["analyze", f"--states={file}", "--axes=nld", "--ends=blocks", "--layers=critical:2"]
    assert main([*asked, f"--out={tmp_path / 'run'}"]) == 0
    run = jc.open_run(tmp_path / "run")
    assert len(run.layers.layers) == 2 and run.layers.num_layers == 7 and run.scores["delta"].stderr is not None
    if family == "gpt2":
        with torch.no_grad():
            last = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1] for ids in IDS]
        array = np.load(file)["hidden"].copy()
        array[:, -1] = torch.stack(last).numpy()
        with pytest.raises(jc.UserError, match="all samples have one length"):
            jc.states(array, axes="nld")


@pytest.mark.skipif("JAXCRIT_REAL_MODEL" not in os.environ, reason="JAXCRIT_REAL_MODEL=FILE.gguf names none")
def test_scores_of_hooks_in_a_real_model(monkeypatch, tmp_path):
    file = Path(os.environ["JAXCRIT_REAL_MODEL"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    lines = [
        f"Tom has {n} maps and gives {n % 7} of them to {name}." for n in range(12) for name in ("Ann", "Bo", "Cy")
    ]
    prompts = [tokenizer(line)["input_ids"] for line in lines]
    states = jc.states(hooked(monkeypatch, tmp_path, model, "model.model.layers", prompts), axes="nld", ends="blocks")
    ours, theirs = jc.score(jc.capture(jc.load(file), prompts)), jc.score(states)
    for key, one in ours.items():
        worst = np.nanmax(np.abs(theirs[key].values - one.values))
        print(f"{key}: largest difference {worst:.1e}")  # shown by pytest -rP
        assert worst <= 1e-5, key
