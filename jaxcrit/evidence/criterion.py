"""What a criterion is: what it looks at in a model, the figure that it makes of it, and what it says about itself.

This module imports no jax, so that the options of a criterion can be listed at once.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxcrit.core.deletions import Deletions, jackknife_stderr
from jaxcrit.core.layers import Direction, LayerScores
from jaxcrit.core.options import Options

Needs = Literal["weights", "two models", "forward", "backward", "perturbed", "routing", "variants"]
Own = Mapping[type[Options], Options]  # options of criteria by their class


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """One criterion's result.

    Attributes:
        values: ``[L]`` float64; NaN where there is none.
        without_each: ``[N, L]``, the same with each sample left out in turn; None where not computed.
        stderr: ``[L]`` standard error where it is not the jackknife of ``without_each``; None where there is none.
        meta: JSON values to keep beside the score.
    """

    values: np.ndarray
    without_each: np.ndarray | None = None
    stderr: np.ndarray | None = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Criterion:
    """One criterion.

    Attributes:
        needs: pass that it needs; one pass serves all criteria that need the same.
        direction: which values are critical.
        score: function of what the pass found that gives `Measured`, or several by key where it serves several keys.
            Of ``forward`` it is given the samples ``[N, L, ...]`` of ``tap`` and ``finish``; else what
            `jaxcrit.evidence.backward`, `jaxcrit.evidence.perturbed`, `jaxcrit.evidence.routing` or
            `jaxcrit.evidence.weights` gives. Where a command of its own makes the evidence, it is the function that
            this command calls.
        tap: what ``forward`` reads of the residual stream, as `jaxcrit.evidence.forward` has it; what ``perturbed``
            is to do, as `jaxcrit.evidence.perturbed` has it.
        finish: what ``forward`` makes of it, batch by batch on the device, for what layers tell of each other:
            a function ``(decoder, taps [L, B, ...]) -> arrays [L, B, ...]``.
        options: options of its own. ``tap`` is then a function of them that gives the tap, and ``score`` takes them as
            its second argument. The file of such a criterion imports no jax before a function is called.
        per_sample: whether ``backward`` needs the gradient of each row by itself.
        command: command that makes its evidence; empty for ``score``.
        formula: formula in a line.
        source: where it comes from.
        responds: what it sees.
        blind: what it does not see, and what misleads it.
    """

    needs: Needs
    direction: Direction
    score: Callable[..., Any]
    tap: Any = None
    finish: Callable[[Any, Any], Any] | None = None
    options: type[Options] | None = None
    per_sample: bool = False
    command: str = ""
    formula: str
    source: str
    responds: str
    blind: str

    def __post_init__(self) -> None:
        if self.options is None or self.tap is None:
            return
        if len(inspect.signature(self.tap).parameters) != 1:
            raise TypeError("tap: of a criterion with options it is a function of these that returns the tap")

    def tapped(self, own: Own) -> Any:
        """The tap, made by the criterion's own options where it has some; for equal options the same function."""
        return self.tap if self.options is None else _made(self.tap, self.asked(own))

    def measured(self, found: Any, own: Own) -> Any:
        """What ``score`` makes of its evidence."""
        return self.score(found) if self.options is None else self.score(found, self.asked(own))

    def asked(self, own: Own) -> Options:
        """The criterion's own options as given, or their defaults."""
        assert self.options is not None
        return own.get(self.options) or self.options()

    def scores(
        self, key: str, found: Measured, meta: Mapping[str, Any], sample_ids: Sequence[str] | None = None
    ) -> LayerScores:
        """Scores of a result; invalid where not finite, with the jackknife's error where there are deletions.

        These are kept beside them where the samples' identities are given.
        """
        left = found.without_each
        stderr = found.stderr if left is None else jackknife_stderr(left)
        facts = {**meta, "needs": self.needs, **found.meta}
        kept = None if left is None or sample_ids is None else Deletions(left, sample_ids)
        return LayerScores(key, found.values, np.isfinite(found.values), self.direction, stderr, facts, kept)


@functools.lru_cache(maxsize=64)
def _made(tap: Callable[[Options], Any], options: Options) -> Any:
    return tap(options)  # kept, for another function would be another program to compile


def mean_over(samples: np.ndarray, weights: np.ndarray | None = None) -> Measured:
    """Mean of ``[N, L]`` over the samples, weighted ``[N]`` where given, and its deletions."""
    weights = np.ones(len(samples)) if weights is None else weights
    weighted = samples * weights[:, None]
    total = weighted.sum(axis=0)
    if len(samples) < 2:
        return Measured(total / weights.sum())
    return Measured(total / weights.sum(), (total - weighted) / (weights.sum() - weights)[:, None])
