"""gradient_norm: norm of the gradient of the response loss by a layer's weights.

``||grad_l||`` of the loss per response token over all rows; high is critical: a step there would change the loss most.
Sees where the loss pulls now; blind to what a later step would find (a block whose output is shut off), and it follows
the scale of weights: making one matrix of a pair larger and the other smaller leaves the model as it is, but not this.
"""

from __future__ import annotations

from jaxcrit.evidence.backward import Gradients
from jaxcrit.evidence.criterion import Criterion, Measured


def gradient_norm(gradients: Gradients) -> Measured:
    """Norm by layer, ``[L]``, nats per unit of weight."""
    return Measured(gradients.total)


CRITERIA = {
    "gradient_norm": Criterion(
        needs="backward",
        direction="high",
        score=gradient_norm,
        formula="||grad_l|| of the loss per response token",
        source="",
        responds="where the loss pulls now",
        blind="a block whose output is shut off. Follows the scale of weights",
    )
}
