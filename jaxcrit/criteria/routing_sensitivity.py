"""routing_sensitivity: how much the loss hangs on how a mixture's layer shares its last prompt token among experts.

With the shares of all experts written softmax(u_l), ``s_l = mean_i || d loss_i / d u_l ||_2``, u_l their logarithm at
the last prompt token of row i and loss_i the mean loss of its response. High is critical. Sees layers where another mix
of the same experts would change the answer; a constant added to the router's logits changes nothing, and where one
expert has all of the share there is nothing to change: it is 0. Blind to experts that are not among those kept (their
shares have a gradient only where the kept ones are not made to sum to 1), to other tokens, and to larger changes of
routing, under which other experts would be kept. Of mixtures only.
"""

from __future__ import annotations

import dataclasses

from jaxcrit.evidence.criterion import Criterion, Measured, mean_over
from jaxcrit.evidence.routing import Routed


def routing_sensitivity(routed: Routed) -> Measured:
    """Sensitivity by layer, ``[L]``, nats; beside it ``load``, the part of all tokens that go to each expert."""
    return dataclasses.replace(mean_over(routed.samples), meta={"load": routed.load.tolist()})


CRITERIA = {
    "routing_sensitivity": Criterion(
        needs="routing",
        direction="high",
        score=routing_sensitivity,
        formula="mean_i ||d loss_i / d log shares|| at the last prompt token",
        source="after C3PO, arXiv 2504.07964",
        responds="layers where another mix of the experts would change the answer",
        blind="experts that are not kept, other tokens, larger changes. Of mixtures only",
    )
}
