"""weight_change: how far tuning moved a layer's weights, ``||tuned - base|| / ||base||`` over all of its tensors.

High is critical. Names the layers that were trained, exactly; blind to whether the change matters: a change of weights
that leaves the function as it is counts in full. Under equal learning rates it mostly follows gradient size, hence
depth (arXiv 2604.17177).
"""

from __future__ import annotations

from jaxcrit.evidence.criterion import Criterion, Measured
from jaxcrit.evidence.weights import WeightChanges


def weight_change(changes: WeightChanges) -> Measured:
    """Relative change of each layer, ``[L]``; that of each expert of a mixture is kept beside it as ``experts``."""
    meta = {} if changes.experts is None else {"experts": (changes.experts[0] / changes.experts[1]).tolist()}
    return Measured(changes.apart / changes.base, meta=meta)


CRITERIA = {
    "weight_change": Criterion(
        needs="two models",
        direction="high",
        score=weight_change,
        formula="||tuned - base|| / ||base||",
        source="",
        responds="which layers were trained, exactly",
        blind="whether the change does anything",
    )
}
