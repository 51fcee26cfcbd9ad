"""rgn: relative gradient norm ``||grad_l|| / ||theta_l||`` (Lee et al. 2023, surgical fine-tuning, arXiv 2210.11466).

High is critical. The authors take it by tensor, as the mean over five batches, and scale learning rates with it; here
it is of a whole layer and of the gradient over all rows, which does not grow as batches get smaller. Sees where a step
of the size of the weights would do most; blind as gradient_norm is.
"""

from __future__ import annotations

from jaxcrit.evidence.backward import Gradients
from jaxcrit.evidence.criterion import Criterion, Measured


def rgn(gradients: Gradients) -> Measured:
    """Relative gradient norm by layer, ``[L]``."""
    return Measured(gradients.total / gradients.weights)


CRITERIA = {
    "rgn": Criterion(
        needs="backward",
        direction="high",
        score=rgn,
        formula="||grad_l|| / ||θ_l||",
        source="Lee et al. 2023",
        responds="where the loss pulls now, relative to the weights",
        blind="a block whose output is shut off",
    )
}
