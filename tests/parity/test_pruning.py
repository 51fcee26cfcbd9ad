"""transformers without some of its layers, and what we write of the others: the same logits and weights."""

import subprocess
import sys

import pytest
from safetensors.numpy import load_file
from support import reference
from support.deep_models import CASES, deep
from support.family_models import BOUND, error, load_path, sequences

from jaxcrit.models.checkpoint import open_checkpoint
from jaxcrit.models.export import write_checkpoint
from jaxcrit.models.pruning import kept_layers, names_before, pruned

torch = reference.torch


@pytest.mark.parametrize("case", CASES)
def test_logits(case, tmp_path):
    model = reference.make(deep(case), tmp_path / "in")
    decoder, drop = load_path(tmp_path / "in"), (1, 2)
    kept = kept_layers(6, drop)
    before = names_before(decoder.config, kept)
    out = write_checkpoint(
        pruned(decoder.config, decoder.weights(), drop),
        open_checkpoint(tmp_path / "in"),
        tmp_path / "out",
        before=before,
    )
    again = reference.read(out)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "in"))
    for name, was in before.items():
        assert ours[name].tobytes() == theirs[was].tobytes(), name
    tokens, lengths = sequences(model.config.vocab_size)
    skipped = [model.model.layers[layer] for layer in drop]
    for row, length in enumerate(lengths):
        _, found = reference.states(again, tokens[row, :length])
        hooks = [layer.register_forward_hook(lambda module, given, out: _first(given, out)) for layer in skipped]
        _, expected = reference.states(model, tokens[row, :length])
        for hook in hooks:
            hook.remove()
        assert error(found, expected) <= BOUND


def _first(given, out):
    """What entered a layer, in the shape of what leaves it."""
    return (given[0], *out[1:]) if isinstance(out, tuple) else given[0]


SLICES = """
slices:
  - sources: [{{model: {model}, layer_range: [0, 2]}}]
  - sources: [{{model: {model}, layer_range: [4, 6]}}]
merge_method: passthrough
dtype: float32
"""


def test_mergekit_writes_the_same_bytes(tmp_path):
    pytest.importorskip("mergekit", reason="needs mergekit: pip install mergekit")
    reference.make(deep("llama-tied"), tmp_path / "in")
    decoder, drop = load_path(tmp_path / "in"), (2, 3)
    before = names_before(decoder.config, kept_layers(6, drop))
    smaller = pruned(decoder.config, decoder.weights(), drop)
    out = write_checkpoint(smaller, open_checkpoint(tmp_path / "in"), tmp_path / "out", before=before)
    (tmp_path / "slices.yml").write_text(SLICES.format(model=tmp_path / "in"))
    program = [sys.executable, "-m", "mergekit.scripts.run_yaml", tmp_path / "slices.yml", tmp_path / "theirs"]
    done = subprocess.run([*map(str, program), "--no-copy-tokenizer"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(value.tobytes() == theirs[name].tobytes() for name, value in ours.items())
