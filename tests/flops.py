"""Counts the floating-point operations of matrix products in a traced function, loops included.

XLA's own count takes the body of a loop once, so it cannot tell how deep a scan goes.
"""

from __future__ import annotations

import math

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def product_flops(function, *arguments) -> int:
    """Twice the multiply-adds of every dot product that runs; of a conditional, of the costliest branch."""
    return _of(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of(jaxpr: Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        inside = [_of(inner) for inner in _inner(equation.params)]
        if equation.primitive.name == "dot_general":
            (left, _), _ = equation.params["dimension_numbers"]
            shared = math.prod(equation.invars[0].aval.shape[axis] for axis in left)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * shared
        elif equation.primitive.name == "cond":
            total += max(inside)
        else:
            total += sum(inside) * equation.params.get("length", 1)
    return total


def _inner(params) -> list[Jaxpr]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, Jaxpr):
                found.append(item)
    return found
