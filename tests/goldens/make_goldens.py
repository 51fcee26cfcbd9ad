"""Writes decoders.npz: what transformers computes, so that the decoder is checked where torch is not installed.

Weights are not stored: `family_models.recipe` makes them again from the tensors' names. Run, with the parity
extra installed, as ``PYTHONPATH=tests python tests/goldens/make_goldens.py``.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from support import reference
from support.family_models import GOLDEN_CASES, raw_config, sequences

from jaxcrit.core.files import write_npz

OUT = Path(__file__).parent / "decoders.npz"


def main() -> None:
    arrays: dict[str, np.ndarray] = {}
    configs = {}
    for case in GOLDEN_CASES:
        with tempfile.TemporaryDirectory() as directory:
            model = reference.make(raw_config(case), Path(directory))
            configs[case] = json.loads((Path(directory) / "config.json").read_text())
        tokens, lengths = sequences(model.config.vocab_size, lengths=(20, 11))
        arrays |= {f"{case}/tokens": tokens, f"{case}/lengths": lengths}
        for row, length in enumerate(lengths):
            hidden, logits = reference.states(model, tokens[row, :length])
            arrays |= {f"{case}/hidden{row}": hidden, f"{case}/logits{row}": logits}
    versions = {"torch": reference.torch.__version__, "transformers": reference.transformers.__version__}
    write_npz(OUT, arrays, {"configs": configs, "versions": versions})
    print(f"{OUT}: {OUT.stat().st_size / 1e3:.0f} kB, {len(configs)} cases")


if __name__ == "__main__":
    main()
