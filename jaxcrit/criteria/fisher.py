"""fisher: trace of the empirical Fisher information of a layer, per weight.

``mean_i ||grad_l log p(response_i | prompt_i)||^2 / |theta_l|`` with the responses of the data (hence empirical, not
the model's own) and every row's own gradient: exact, not a square of batch means. High is critical. Sees layers whose
weights matter to single rows, also where rows pull in opposite directions and gradient_norm cancels; blind to a block
whose output is shut off; grows with the length of responses.
"""

from __future__ import annotations

from jaxcrit.evidence.backward import Gradients
from jaxcrit.evidence.criterion import Criterion, Measured, mean_over


def fisher(gradients: Gradients) -> Measured:
    """Empirical Fisher per weight by layer, ``[L]``."""
    assert gradients.samples is not None
    return mean_over(gradients.samples / gradients.sizes)


CRITERIA = {
    "fisher": Criterion(
        needs="backward",
        direction="high",
        score=fisher,
        per_sample=True,
        formula="mean_i ||grad_l log p(response_i | prompt_i)||² / |θ_l|, row by row",
        source="empirical Fisher",
        responds="weights that matter to single rows",
        blind="a block whose output is shut off",
    )
}
