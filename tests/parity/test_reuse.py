"""A model that goes on from another's keys and values, against transformers given the same ``past_key_values``."""

import jax
import numpy as np
import pytest
from support import reference
from support.family_models import load_path, one_device, raw_config
from support.reuse import HEADS, rows

from jaxcrit.evidence.reuse import sources, walk
from jaxcrit.models.decoder import logits


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize("case", ["llama-gqa", "qwen2-tied"])
def test_everything_reused(case, tmp_path):
    torch, models = reference.torch, []
    for name in ("receiver", "sender"):
        models.append(reference.make(raw_config(case), tmp_path / name))
        if name == "sender":
            for number, weight in enumerate(models[1].model.layers.parameters()):
                torch.manual_seed(number)
                weight.data += 0.2 * weight.data.std() * torch.randn_like(weight)
            models[1].save_pretrained(tmp_path / "sender")
    receiver, sender = (load_path(tmp_path / name) for name in ("receiver", "sender"))
    depth = receiver.config.num_layers
    given, whole = rows(vocab=96)
    plan = np.stack([np.zeros(depth, int), sources(depth, [])])
    own, reused = walk(receiver, sender, given, plan, one_device())[0]
    for slot, (row, head) in enumerate(zip(whole, HEADS, strict=True)):
        tokens = torch.from_numpy(np.asarray(row, np.int64))[None]
        with torch.no_grad():
            for model, found in zip(models, (own, reused), strict=True):
                past = model(tokens[:, :head], use_cache=True).past_key_values
                expected = models[0](tokens[:, head:], past_key_values=past).logits[0]
                ours = jax.device_get(logits(receiver, found[slot, : len(row) - head]))
                np.testing.assert_allclose(ours, expected.numpy(), atol=1e-4)
