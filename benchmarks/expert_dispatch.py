"""What a mixture's MLP costs by the ways in which tokens can go to their experts.

    python benchmarks/expert_dispatch.py

All experts for all tokens, XLA's grouped product, and blocks of one expert's pairs (`jaxcrit.models.mixture`), at four
sizes: forward, and forward with the gradient of everything. Processor time, the least of the rounds after the one that
compiles, in turn; and the operations of the matrix products, from the trace, for XLA counts a loop's body once. Of the
grouped product the count is what it has to do; on CPUs XLA does as much as all experts, and more. Writes
benchmarks/results/expert_dispatch.json.
"""

import time

import jax
import jax.numpy as jnp
from absl import app, flags
from environment import write_result

from jaxcrit.models.mixture import by_all, by_blocks, by_groups
from jaxcrit.parallel.accounting import product_flops

FORMS = {"all experts": by_all, "grouped product": by_groups, "blocks": by_blocks}
# Tokens, width, inner width, experts, experts of a token; the last is a step of generation.
SIZES = {
    "small": (256, 256, 128, 32, 4),
    "few experts": (1024, 512, 896, 8, 2),
    "many experts": (512, 512, 256, 64, 8),
    "a step": (8, 512, 256, 64, 8),
}
ROUNDS = flags.DEFINE_integer("rounds", 3, "rounds that are timed")


def inputs(tokens, width, inner, experts, chosen):
    """x, chosen experts, their weights, and the experts' matrices."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (tokens, width), (experts, inner, width), (experts, inner, width), (experts, width, inner)
    x, *matrices = (jax.random.normal(key, one) / one[-1] ** 0.5 for key, one in zip(keys, shapes, strict=False))
    weights, to = jax.lax.top_k(jax.nn.softmax(jax.random.normal(keys[4], (tokens, experts))), chosen)
    return x, to, weights, tuple(matrices)


def calls(form):
    """Forward, and forward with gradients."""

    def forward(x, to, weights, matrices):
        return form(x, to, weights, matrices, jax.nn.silu)

    def total(x, to, weights, matrices):
        return jnp.sum(jnp.sin(forward(x, to, weights, matrices)))

    return {"forward": forward, "gradient": jax.grad(total, argnums=(0, 2, 3))}


def main(_):
    found = {}
    for size, shape in SIZES.items():
        given = inputs(*shape)
        ways = {(name, kind): call for name, form in FORMS.items() for kind, call in calls(form).items()}
        compiled = {way: jax.jit(call).lower(*given).compile() for way, call in ways.items()}
        seconds = {}
        for _ in range(ROUNDS.value + 1):
            for way, call in compiled.items():
                began = time.process_time()
                jax.block_until_ready(call(*given))
                seconds.setdefault(way, []).append(time.process_time() - began)
        rows = {}
        for (name, kind), times in seconds.items():
            row = rows.setdefault(name, {})
            row[f"{kind}_ms"] = round(1e3 * min(times[1:]), 1)
            row[f"{kind}_gflop"] = round(product_flops(ways[name, kind], *given) / 1e9, 3)
        found[size] = {
            "shape": dict(zip(("tokens", "width", "inner", "experts", "chosen"), shape, strict=True)),
            **rows,
        }
        for name, row in rows.items():
            print(f"{size:<14}{name:<18}" + "".join(f"{key} {value:>9}  " for key, value in row.items()), flush=True)
    write_result("expert_dispatch", found)


if __name__ == "__main__":
    app.run(main)
