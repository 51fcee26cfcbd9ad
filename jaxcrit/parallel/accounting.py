"""What a program costs, before it runs: bytes from shapes, products from its trace, collectives from its text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$", re.M)
_WHILE = re.compile(r" while\(.*?condition=%?([\w.-]+), body=%?([\w.-]+)")
_NAME = re.compile(r"%([\w.-]+)")
_CONSTANT = re.compile(r"%([\w.-]+) = [su]32\[\][^ ]* constant\((\d+)\)")
_COUNTER = re.compile(r" = [su]32\[\][^ ]* get-tuple-element\(.*\), index=(\d+)")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def shard_bytes(tree: Any) -> int:
    """Bytes of every array (or `jax.ShapeDtypeStruct` with a sharding) of a tree on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def product_flops(function: Callable[..., Any], *arguments: Any, turns: int = 1) -> int:
    """Twice the multiply-adds of every dot product that runs, loops included; of a conditional, the costliest branch.

    XLA's own count takes the body of a loop once, so it cannot tell how deep a scan goes.

    Args:
        function: what runs.
        arguments: arrays or their shapes.
        turns: number of turns of a loop without a fixed number of them.
    """
    return _products(jax.make_jaxpr(function)(*arguments).jaxpr, turns)


def _products(jaxpr: Jaxpr, turns: int) -> int:
    total = 0
    for equation in jaxpr.eqns:
        inside = [_products(inner, turns) for inner in _inner(equation.params)]
        if equation.primitive.name == "dot_general":
            (left, _), _ = equation.params["dimension_numbers"]
            taken, result = (_shape(side[0]) for side in (equation.invars, equation.outvars))
            total += 2 * math.prod(result) * math.prod(taken[axis] for axis in left)
        elif equation.primitive.name == "ragged_dot_general":  # every row counts with one group
            total += 2 * math.prod(_shape(equation.invars[0])) * _shape(equation.outvars[0])[-1]
        elif equation.primitive.name == "cond":
            total += max(inside)
        elif equation.primitive.name == "while":
            total += sum(inside) * turns
        else:
            total += sum(inside) * equation.params.get("length", 1)
    return total


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(variable.aval.shape)


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def collectives(program: str, turns: int = 1) -> dict[str, tuple[int, int]]:
    """Collectives that one device takes part in: how often each kind runs, and the bytes that come out of it.

    Args:
        program: text of a compiled program (``compiled.as_text()``). Bodies of loops count as often as the loop's
            condition says.
        turns: number of turns of a loop without a constant limit.

    Returns:
        kind -> (runs, bytes), kinds that occur.
    """
    bodies = _computations(program)
    times = dict.fromkeys(bodies, 0)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in bodies[name]:
            loop = _WHILE.search(line)
            for called in set(_NAME.findall(line)) & bodies.keys():
                often = _turns(bodies[loop[1]], bodies[called], turns) if loop and called == loop[2] else 1
                visit(called, count * often)

    entry = re.search(r"^ENTRY %?([\w.-]+)", program, re.M)
    if entry:
        visit(entry[1], 1)
    found: dict[str, tuple[int, int]] = {}
    seen: set[str] = set()
    for name, lines in bodies.items():
        for line in lines:
            if (match := _COLLECTIVE.search(line)) and times[name]:
                # One that is overlapped with computation stands in each of the fusions that drive it.
                if (channel := _CHANNEL.search(line)) and channel[1] in seen:
                    continue
                seen |= {channel[1]} if channel else set()
                runs, size = found.get(match[2], (0, 0))
                found[match[2]] = (runs + times[name], size + times[name] * _result_bytes(match[1]))
    return found


def _computations(program: str) -> dict[str, list[str]]:
    starts = list(_COMPUTATION.finditer(program))
    ends = [start.start() for start in starts[1:]] + [len(program)]
    return {start[1]: program[start.end() : end].splitlines() for start, end in zip(starts, ends, strict=True)}


def _turns(condition: list[str], body: list[str], default: int) -> int:
    """Of a loop that counts up from 0 to a constant; products that are gathered piece by piece count in twos."""
    limit = max(_constants(condition).values(), default=0)
    if not limit:
        return default
    counter = next((int(found[1]) for line in condition if (found := _COUNTER.search(line))), 0)
    ends = next((_NAME.findall(line.split(" tuple(")[1]) for line in body if "ROOT" in line and " tuple(" in line), [])
    end = f"%{ends[counter]} = " if counter < len(ends) else "no such line"
    known = _constants(body)
    steps = [known[name] for line in body if end in line for name in _NAME.findall(line) if name in known]
    return -(-limit // max((1, *steps)))


def _constants(lines: list[str]) -> dict[str, int]:
    return {found[1]: int(found[2]) for line in lines if (found := _CONSTANT.search(line))}


def _result_bytes(kind: str) -> int:
    """Of ``f32[8,4]``, or the largest of a tuple (an asynchronous start returns operand, result and flags)."""
    sizes = [
        _BYTES.get(dtype, 4) * math.prod(int(size) for size in shape.split(",") if size)
        for dtype, shape in _ARRAY.findall(kind)
    ]
    return max(sizes, default=0)
