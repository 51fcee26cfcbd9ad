"""transformers without some of its layers, and what we write of the others: the same logits and weights."""

import pytest
from support import reference
from support.family_models import BOUND, error, load_path, sequences

from jaxcrit.models.checkpoint import open_checkpoint
from jaxcrit.models.export import write_checkpoint
from jaxcrit.models.pruning import kept_layers, names_before, pruned
from tests.models.test_pruning import CASES, deep

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
    ours, theirs = again.state_dict(), model.state_dict()
    for name, was in before.items():
        assert torch.equal(ours[name], theirs[was]), name
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
